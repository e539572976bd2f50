"""The page at `/`: what is sent of it, and that its texts and elements fit together."""

import re

import pytest
from PIL import Image
from tiny_server import DEMO, about_demo, data_url

from mcv_serve import page

STATIC = page.files(page.__name__).joinpath("static")


def read(name):
    return STATIC.joinpath(name).read_text("utf-8")


def directives(response):
    return dict(one.strip().partition(" ")[::2] for one in response.headers["content-security-policy"].split(";"))


def test_page_is_served_with_a_strict_policy(client):
    for path in page.paths():
        response = client.get(path)
        assert response.status_code == 200
        policy = directives(response)
        assert (policy["default-src"], policy["script-src"], policy["style-src"]) == ("'none'", "'self'", "'self'")
        assert policy["frame-ancestors"] == policy["base-uri"] == policy["form-action"] == "'none'"
        assert "unsafe" not in response.headers["content-security-policy"]
        assert response.headers["x-content-type-options"] == "nosniff"
    assert client.get("/").headers["content-type"].startswith("text/html")
    assert client.head("/").status_code == 200
    assert client.get("/page/../__init__.py").status_code == client.get("/page/nothing.js").status_code == 404


def test_page_needs_no_key_but_what_it_asks_does(serving):
    with serving(api_keys=("secret",)) as running, running.client() as client:
        assert {client.get(path).status_code for path in page.paths()} == {200}
        assert client.get("/props").status_code == 401


def test_nothing_comes_from_elsewhere():
    """Every address in the page is one of its own, relative, so that it may stand behind a path; nothing is inline."""
    for path in page.paths():
        name = "index.html" if path == "/" else path.removeprefix("/page/")
        text = read(name)
        assert not re.findall(r"""(?:https?:)?//(?!www\.w3\.org/2000/svg)[\w.]+\.\w+""", text), name
        assert not re.findall(r"url\(|@import|innerHTML|insertAdjacentHTML|\beval\(", text), name
    html = read("index.html")
    found = re.findall(r'(?:src|href)="([^"#]+)"', html)
    assert found and {f"/{one}" for one in found} <= page.paths()
    assert not re.findall(r'<style|style="|\son\w+="|<script(?![^>]*\ssrc=)', html)
    modules = [one for name in map(str, page.paths()) if name.endswith(".js") for one in _imports(name.removeprefix("/page/"))]
    assert modules and {f"/page/{one}" for one in modules} <= page.paths()


def _imports(name):
    return re.findall(r'from "\./([^"]+)"', read(name))


def test_both_languages_say_everything_and_no_more():
    """A text that is missing would be seen by whoever speaks that language alone."""
    texts = read("texts.js")
    languages = {
        name: dict(re.findall(r'(\w+): "([^"]*)"', block)) for name, block in re.findall(r"  (\w\w): {(.*?)\n  }", texts, re.S)
    }
    assert set(languages) == {"en", "zh"} == set(re.findall(r'<option value="(\w\w)" lang', read("index.html")))
    en, zh = languages["en"], languages["zh"]
    assert en.keys() == zh.keys()
    for name in en:
        assert sorted(re.findall(r"{\w+}", en[name])) == sorted(re.findall(r"{\w+}", zh[name])), name
    html = read("index.html")
    used = set(re.findall(r'data-(?:text|placeholder)="(\w+)"', html))
    for script in ("main.js", "picture.js"):
        for call in re.findall(r"tell\(.*", read(script)):
            used |= {name for name in re.findall(r'"(\w+)"', call) if name in en}
    assert used == en.keys()


@pytest.mark.parametrize("script", ["main.js", "picture.js", "camera.js"])
def test_every_element_that_a_script_wants_is_there(script):
    ids = set(re.findall(r'\sid="([\w-]+)"', read("index.html")))
    text = read(script)
    wanted = set(re.findall(r'(?:\bat|getElementById)\("([\w-]+)"\)', text))
    for names in re.findall(r"\[([^\]]*)\]\.map\(\(id\)", text):
        wanted |= set(re.findall(r'"([\w-]+)"', names))
    assert wanted and wanted <= ids
    assert set(re.findall(r'(?:for|aria-\w+by)="([\w-]+)"', read("index.html"))) <= ids


def test_price_says_how_pictures_are_cut(client, engine):
    """Before anything is encoded: the same slices, and as many visual tokens, as the answer then has."""
    url = data_url(Image.open(DEMO).convert("RGB").resize((336, 224)))
    for most, cut in ((9, [3, 2]), (2, [2, 1]), (1, None)):
        body = about_demo(url=url, max_slice_nums=most)
        told = client.post("/v1/chat/completions/input_tokens", json=body).json()
        answered = client.post("/v1/chat/completions", json=body).json()
        (picture,), (seen,) = told["pictures"], answered["pictures"]
        assert picture["grid"] == seen["grid"] == cut
        assert picture["slice_sizes"] == seen["slice_sizes"]
        assert sum(picture["slice_tokens"]) == told["image_tokens"] == seen["visual_tokens"]
