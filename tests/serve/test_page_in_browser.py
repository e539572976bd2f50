"""The page in a real Chromium, clicked through; screenshots are left in $MCV_SCREENSHOTS, or the test's own folder."""

import contextlib
import json
import os
import shutil
from pathlib import Path

import pytest
from PIL import Image
from tiny_server import ANSWER, DEMO, QUESTION, Gate

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
if CHROMIUM is None:
    pytest.skip("no Chromium here: apt-get install chromium (fonts-noto-cjk for Chinese)", allow_module_level=True)
from playwright.sync_api import Error, expect, sync_playwright  # noqa: E402 - needed where there is a Chromium

pytestmark = pytest.mark.waits
FOREVER = 1_500_000
"""Milliseconds: what does not come at all ends the test, after all else; on a loaded machine a browser takes minutes."""


@pytest.fixture(scope="module")
def browser():
    # a camera that shows a test pattern, for whoever is allowed to see it
    fake = ["--use-fake-device-for-media-stream", "--use-fake-ui-for-media-stream"]
    with sync_playwright() as playwright:
        expect.set_options(timeout=FOREVER)
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", *fake], timeout=FOREVER)
        yield browser
        browser.close()


@pytest.fixture
def open_page(browser, running, tmp_path):
    """`with open_page(locale="zh-CN") as page`: the page, which must not have complained when it is closed."""
    folder = Path(os.environ.get("MCV_SCREENSHOTS", tmp_path))
    folder.mkdir(parents=True, exist_ok=True)

    @contextlib.contextmanager
    def opened(address=running.address, expected=(), **context):
        with contextlib.closing(browser.new_context(**{"locale": "en-GB", **context})) as tab:
            page = tab.new_page()
            page.set_default_timeout(FOREVER)
            complaints = []
            page.on("pageerror", lambda error: complaints.append(str(error)))
            page.on("console", lambda said: complaints.append(said.text) if said.type in ("error", "warning") else None)
            page.shoot = lambda name: page.screenshot(path=folder / f"{name}.png", full_page=True)
            page.goto(address)
            yield page
            assert [one for one in complaints if not any(known in one for known in expected)] == []

    return opened


@pytest.fixture
def large(tmp_path):
    """A picture that is cut: 3 columns and 2 rows."""
    path = tmp_path / "large.png"
    Image.open(DEMO).convert("RGB").resize((336, 224)).save(path)
    return path


def ask(page, question):
    page.get_by_label("Question", exact=True).fill(question)
    page.get_by_label("Question", exact=True).press("Enter")


def answers(page):
    return page.locator(".answer[aria-busy=false]")


def test_a_picture_is_asked_about_twice(open_page, engine, large):
    with open_page(viewport={"width": 1280, "height": 900}) as page:
        page.set_input_files("#file", large)
        expect(page.locator("#cells span")).to_have_count(6)
        expect(page.locator("#cut")).to_have_text("An overview (64) and 3 × 2 slices: 448 visual tokens.")
        expect(page.locator("#price")).to_have_text("Visual tokens: 448 of 4,096.")
        expect(page.get_by_label("Question", exact=True)).to_be_focused()
        chat = engine.chat()
        first = chat.ask(large, QUESTION).text
        ask(page, QUESTION)
        expect(answers(page)).to_have_text([first])
        expect(page.locator("#state")).to_contain_text("Answered in")
        second = chat.ask(None, "What colour is the circle?").text
        ask(page, "What colour is the circle?")
        expect(answers(page)).to_have_text([first, second])
        expect(page.locator("h3.asked")).to_have_text([QUESTION, "What colour is the circle?"])
        # the second question finds the picture and the first turn read already
        expect(page.locator(".stats").nth(1)).to_contain_text("Encoded in 0 s.")
        known = int(page.locator(".stats").nth(1).inner_text().split(" known")[0].split(", ")[-1])
        assert known > 448
        page.shoot("answered")


def test_slices_change_the_cut_and_the_price(open_page, engine, large):
    with open_page() as page:
        page.set_input_files("#file", large)
        expect(page.locator("#cells span")).to_have_count(6)
        page.get_by_label("Question", exact=True).fill(QUESTION)
        slices = page.get_by_label("Slices at most")
        slices.fill("2")
        slices.press("Tab")
        expect(page.locator("#cells span")).to_have_count(2)
        prompt = engine.prompt([{"role": "user", "content": [large, QUESTION]}], max_slice_nums=2)
        price = f"Visual tokens: 192. With the conversation: {len(prompt.ids)} of 4,096."
        expect(page.locator("#price")).to_have_text(price)
        slices.fill("1")
        slices.press("Tab")
        expect(page.locator("#cut")).to_have_text("The picture is seen whole: 64 visual tokens.")
        with page.expect_request("**/v1/chat/completions") as asked:
            page.get_by_role("button", name="Ask", exact=True).click()
        assert asked.value.post_data_json["max_slice_nums"] == 1
        expect(answers(page)).to_have_count(1)


def test_the_downsample_mode_is_a_choice_where_the_model_has_one(open_page, running, large):
    """The demo model has none: `/props` and the price are played."""
    with open_page(address="about:blank") as page:
        asked = []

        def props(route):
            told = route.fetch().json()
            route.fulfill(json={**told, "downsample_modes": ["16x", "4x"]})

        def price(route):
            asked.append(route.request.post_data_json.get("downsample_mode"))
            tokens = 256 if asked[-1] == "4x" else 64
            cut = {"grid": None, "slice_sizes": [[448, 448]], "slice_tokens": [tokens]}
            route.fulfill(json={"input_tokens": tokens + 9, "image_tokens": tokens, "pictures": [cut]})

        page.route("**/props", props)
        page.route("**/input_tokens", price)
        page.goto(running.address)
        page.set_input_files("#file", large)
        expect(page.locator("#price")).to_have_text("Visual tokens: 64 of 4,096.")
        page.get_by_label("Downsampling").select_option("4x")
        expect(page.locator("#price")).to_have_text("Visual tokens: 256 of 4,096.")
        assert asked == [None, "4x"]


def test_text_comes_as_it_is_made_and_stop_ends_it(open_page, engine, running):
    schema = {"type": "string", "minLength": 200, "maxLength": 300, "pattern": "^[a-z]+$"}
    with open_page() as page, Gate(engine) as gate:
        page.get_by_text("Answer as JSON").click()
        page.get_by_label("JSON schema").fill(json.dumps(schema))
        page.get_by_label("Hold the answer").check()
        ask(page, "Hello")
        stop = page.get_by_role("button", name="Stop")
        expect(stop).to_be_enabled()
        gate.let(6)
        running_answer = page.locator(".answer[aria-busy=true]")
        expect(running_answer).not_to_have_text("")
        expect(page.locator("#state")).to_have_text("Answering…")
        assert len(running.service.answering) == 1
        page.shoot("answering")
        stop.click()
        expect(page.locator("#state")).to_have_text("Stopped.")
        gate.open()
        expect(stop).to_be_disabled()
        expect(page.get_by_role("button", name="Ask", exact=True)).to_be_enabled()
        assert answers(page).inner_text() != ""
        while running.service.answering:  # the row is free without anybody asking for it
            page.wait_for_timeout(10)


def test_an_answer_is_held_to_a_schema_and_is_text_whatever_it_holds(open_page):
    with open_page() as page:
        page.set_input_files("#file", DEMO)
        page.get_by_text("Answer as JSON").click()
        schema = page.get_by_label("JSON schema")
        page.get_by_label("Hold the answer").check()
        schema.fill("[1]")
        ask(page, QUESTION)
        expect(page.locator("#schema-error")).to_contain_text("This is no JSON object")
        expect(schema).to_be_focused()
        expect(page.locator(".answer")).to_have_count(0)
        schema.fill('{"const": "<img src=x onerror=alert(1)>"}')
        page.get_by_label("Question", exact=True).press("Enter")
        expect(answers(page)).to_have_text(['"<img src=x onerror=alert(1)>"'])
        page.shoot("schema")


def test_a_picture_is_dropped_pasted_and_photographed(open_page):
    give = """([kind, bytes]) => {
      const moved = new DataTransfer();
      moved.items.add(new File([new Uint8Array(bytes)], kind + ".png", { type: "image/png" }));
      const event = kind === "paste"
        ? new ClipboardEvent("paste", { clipboardData: moved, bubbles: true, cancelable: true })
        : new DragEvent("drop", { dataTransfer: moved, bubbles: true, cancelable: true });
      document.body.dispatchEvent(event);
    }"""
    with open_page(permissions=["camera"]) as page:
        shown = page.locator("#shown")
        for kind in ("drop", "paste"):
            page.evaluate(give, [kind, list(DEMO.read_bytes())])
            expect(shown).to_have_attribute("alt", f"{kind}.png")
            expect(page.locator("#cut")).to_have_text("The picture is seen whole: 64 visual tokens.")
        ask(page, QUESTION)
        expect(answers(page)).to_have_text([ANSWER])
        page.get_by_role("button", name="Photograph").click()
        page.get_by_role("button", name="Take the picture").click()
        expect(shown).to_have_attribute("alt", "photograph.jpg")
        expect(page.locator("#cut")).to_contain_text("visual tokens")
        expect(page.locator(".answer")).to_have_count(0)  # another picture, another conversation
        expect(page.get_by_role("dialog")).to_have_count(0)


def test_what_the_server_refuses_is_said_and_nothing_typed_is_lost(open_page, tmp_path):
    broken = tmp_path / "broken.png"
    broken.write_bytes(b"\x89PNG\r\n\x1a\nnothing more")
    with open_page(expected=["400 (Bad Request)"]) as page:
        page.set_input_files("#file", broken)
        failure = page.locator("#failure")
        expect(failure).not_to_have_text("")
        expect(page.locator("#unshowable")).to_be_visible()
        ask(page, "And this?")
        expect(page.get_by_label("Question", exact=True)).to_have_value("And this?")
        expect(page.locator(".answer")).to_have_count(0)
        expect(failure).not_to_have_text("")
        page.set_input_files("#file", DEMO)
        expect(failure).to_have_text("")
        expect(page.locator("#unshowable")).to_be_hidden()


def test_a_key_is_asked_for_where_one_is_needed(open_page, serving):
    with serving(api_keys=("s3cret",)) as guarded, open_page(guarded.address, ["401 (Unauthorized)"]) as page:
        key = page.get_by_label("API key", exact=True)
        expect(key).to_be_focused()
        page.shoot("key")
        key.fill("wrong")
        key.press("Enter")
        expect(page.locator("#key-error")).to_have_text("The server does not take this key.")
        key.fill("s3cret")
        key.press("Enter")
        expect(key).to_be_hidden()
        page.set_input_files("#file", DEMO)
        ask(page, QUESTION)
        expect(answers(page)).to_have_text([ANSWER])


def test_chinese_dark_and_small(open_page):
    telephone = {"viewport": {"width": 390, "height": 844}, "has_touch": True, "is_mobile": True, "device_scale_factor": 2}
    with open_page(locale="zh-CN", color_scheme="dark", **telephone) as page:
        assert page.title() == "看图提问"
        assert page.locator("html").get_attribute("lang") == "zh"
        with page.expect_file_chooser() as chooser:  # a telephone's own camera
            page.get_by_role("button", name="拍照").tap()
        chooser.value.set_files(DEMO)
        page.get_by_label("问题", exact=True).fill(QUESTION)
        page.get_by_role("button", name="提问", exact=True).tap()
        expect(answers(page)).to_have_text([ANSWER])
        expect(page.locator(".stats")).to_contain_text("回答")
        assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
        page.shoot("chinese-dark-small")
        page.get_by_label("语言").select_option("en")
        expect(page.locator(".stats")).to_contain_text("Answer:")
        expect(page.locator("#price")).to_contain_text("Visual tokens")


def test_all_is_reached_by_keyboard_and_has_a_name(open_page):
    with open_page(expected=["TrustedHTML"]) as page:
        expect(page.locator("#model")).not_to_have_text("")
        names = []
        for _ in range(30):
            page.keyboard.press("Tab")
            focused = page.locator(":focus")
            if not focused.count():
                break
            names.append(focused.evaluate("e => e.id || e.className || e.tagName.toLowerCase()"))
        wanted = ["skip", "language", "choose", "photograph", "slices", "question", "summary", "send", "anew"]
        assert [name for name in names if name in wanted][: len(wanted)] == wanted
        for role in ("button", "textbox", "combobox", "spinbutton", "checkbox", "log"):
            for element in page.get_by_role(role).all():
                assert element.aria_snapshot().split('"')[1:2], role
        # the policy holds: what is written into the page as HTML is refused
        with pytest.raises(Error, match="TrustedHTML"):
            page.evaluate("document.body.innerHTML = '<b>x</b>'")
