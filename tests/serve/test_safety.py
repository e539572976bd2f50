"""Limits, keys, strangers' pages and bodies, and what is fetched from where."""

import io
import json
import logging
import socket
import ssl
import subprocess
import threading
import zlib
from contextlib import contextmanager
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest
from PIL import Image
from tiny_server import ANSWER, DEMO, about_demo, data_url, text_chat

from mcv_serve import server
from mcv_serve.errors import ApiError
from mcv_serve.isolated import IsolatedDecoder
from mcv_serve.remote import Fetcher, is_public

CHAT = "/v1/chat/completions"
OPEN = ("/health", "/healthz", "/ready", "/readyz", "/ping")


def test_keys_are_asked_for_on_every_route_but_health(serving):
    with serving(api_keys=("secret", "another")) as running, running.client() as client:
        schema = running.server.starting._app.openapi()
        routes = [(method, path) for path, item in schema["paths"].items() for method in item]
        assert len(routes) > 15
        for method, path in [*routes, ("get", "/openapi.json"), ("get", "/nothing"), ("post", "/chat/completions")]:
            found = client.request(method, path)
            assert found.status_code == (200 if path in OPEN else 401), path
            if path not in OPEN:
                assert found.headers["www-authenticate"] == "Bearer"
                assert found.json()["code" if path.startswith("/api/") else "error"]
        shown = ({"authorization": "Bearer secret"}, {"authorization": "bearer another"}, {"x-api-key": "secret"})
        for headers in shown:
            assert client.get("/v1/models", headers=headers).status_code == 200
        for shown in ("Bearer secre", "Bearer secret2", "Basic secret", "secret", "Bearer", "Bearer \xff"):
            assert client.get("/v1/models", headers={"authorization": shown.encode("latin1")}).status_code == 401


def test_security_headers_and_no_cors(client):
    for path in ("/health", "/v1/models", "/nothing"):
        headers = client.get(path, headers={"origin": "https://evil.example"}).headers
        assert headers["x-content-type-options"] == "nosniff"
        assert headers["x-frame-options"] == "DENY"
        assert "default-src 'none'" in headers["content-security-policy"]
        assert "access-control-allow-origin" not in headers and "server" not in headers


def test_cors_for_those_that_are_named(serving):
    with serving(origins=("https://mine.example",), api_keys=("k",)) as running, running.client() as client:
        asking = {"access-control-request-method": "POST", "access-control-request-headers": "authorization"}
        ours = client.options(CHAT, headers={"origin": "https://mine.example", **asking})
        assert ours.headers["access-control-allow-origin"] == "https://mine.example"
        theirs = client.options(CHAT, headers={"origin": "https://evil.example", **asking})
        assert "access-control-allow-origin" not in theirs.headers


@pytest.mark.parametrize("dialect", ["openai", "ollama", "vqa"])
def test_bodies_that_are_too_large(serving, dialect):
    with serving(body_mb=0.5) as running, running.client() as client:
        large = "x" * 600_000
        if dialect == "openai":
            found = client.post(CHAT, json=text_chat(large))
        elif dialect == "ollama":
            found = client.post("/api/generate", json={"prompt": large})
        else:
            found = client.post("/vqa", files={"file": large.encode()}, data={"question": "x"})
        assert found.status_code == 413

        def pieces():
            for _ in range(600):
                yield b"x" * 1000

        assert client.post(CHAT, content=pieces()).status_code == 413  # without a length
        assert client.post(CHAT, json=about_demo()).json()["choices"][0]["message"]["content"] == ANSWER


def test_limits_of_a_request(serving):
    with serving(pictures=2, picture_mb=0.01, max_tokens=50, answers=2) as running, running.client() as client:
        part = {"type": "image_url", "image_url": {"url": data_url()}}

        def refused(body):
            found = client.post(CHAT, json=body)
            return found.status_code, found.json()["error"]["code"]

        many = {"messages": [{"role": "user", "content": [part] * 3 + [{"type": "text", "text": "x"}]}]}
        assert refused(many) == (400, "too_many_images")
        noise = Image.effect_noise((200, 200), 90)
        assert refused(about_demo(url=data_url(noise))) == (413, "image_too_large")
        assert refused(text_chat("x", max_tokens=51)) == (400, "invalid_value")
        assert refused(text_chat("x", n=3)) == (400, "invalid_value")
        assert client.post(CHAT, json=about_demo(max_tokens=50)).status_code == 200


def test_ten_thousand_pictures(client):
    part = {"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA"}}
    found = client.post(CHAT, json={"messages": [{"role": "user", "content": [part] * 10_000}]})
    assert found.status_code == 400 and found.json()["error"]["code"] == "too_many_images"


def bomb():
    """A PNG of 100,000 x 100,000 pixels in a few kilobytes."""

    def chunk(kind, data):
        return len(data).to_bytes(4, "big") + kind + data + zlib.crc32(kind + data).to_bytes(4, "big")

    size = (100_000).to_bytes(4, "big")
    header = chunk(b"IHDR", size + size + b"\x08\x02\0\0\0")
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(b"\0" * 3_000_000, 9)) + chunk(b"IEND", b"")


def truncated_jpeg():
    buffer = io.BytesIO()
    Image.open(DEMO).convert("RGB").save(buffer, "JPEG")
    return buffer.getvalue()[:200]


HOSTILE = (bomb(), truncated_jpeg(), b"GIF89a", b"\0" * 1000, b"<svg xmlns=''/>", b"II*\0\xff\xff\xff\xff")


@pytest.mark.waits
@pytest.mark.parametrize("isolate", [False, True])
def test_hostile_pictures_hurt_nobody(serving, isolate):
    with serving(isolate=isolate) as running, running.client() as client:
        for data in HOSTILE:
            found = client.post(CHAT, json=about_demo(url=data_url(data)))
            assert found.status_code == 400 and found.json()["error"]["code"] == "invalid_image"
        assert client.post(CHAT, json=about_demo()).json()["choices"][0]["message"]["content"] == ANSWER


@pytest.mark.parametrize(
    "content",
    [
        b"--x\r\nContent-Disposition: form-data; name=\"file\"; filename=\"a\"\r\n\r\nabc",  # cut off
        b"--y--",
        b"",
        b"--x\r\n" * 1000,
        b"--x\r\nContent-Disposition: form-data; name=\"question\"\r\n\r\nwhat\r\n--x--\r\n",
        b"--x\r\n\r\n\r\n--x--\r\n",
        b"\xff" * 100,
    ],
)  # fmt: skip
@pytest.mark.parametrize("kind", ["multipart/form-data; boundary=x", "multipart/form-data", "text/plain"])
def test_forms_that_are_none(client, content, kind):
    found = client.post("/vqa", content=content, headers={"content-type": kind})
    assert found.status_code in (400, 415), found.text
    assert found.json()["error"]["code"]


def test_deep_json_and_wrong_types_everywhere(client):
    deep = b'{"messages":' + b'[{"a":' * 5000 + b"1" + b"}]" * 5000 + b"}"
    for path in (
        CHAT,
        "/v1/completions",
        "/v1/responses",
        "/api/chat",
        "/api/generate",
        "/tokenize",
        "/detokenize",
        "/api/show",
    ):
        for body in (
            deep,
            b"null",
            b"3",
            b'{"messages": {"a": 1}, "prompt": {"a": 2}, "input": 4, "tokens": "x", "model": []}',
        ):
            found = client.post(path, content=body)
            assert found.status_code == 400, (path, found.text)


@pytest.mark.waits
def test_slow_clients_are_let_go_and_others_do_not_wait(serving, monkeypatch):
    with serving() as running, running.client() as client:
        assert client.post(CHAT, json=about_demo()).status_code == 200
        monkeypatch.setattr(server, "_HEADER_S", 0.1)
        where = running.socket.getsockname()
        with socket.create_connection(where) as silent:
            silent.sendall(b"POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\n")
            assert client.post(CHAT, json=about_demo()).json()["choices"][0]["message"]["content"] == ANSWER
            assert b" 408 " in silent.makefile("rb").readline()
        monkeypatch.setattr(server, "_HEADER_S", 3600)
        usual = running.service.settings
        running.service.settings = replace(usual, body_s=0.1)
        with socket.create_connection(where) as slow:
            slow.sendall(b"POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\ncontent-length: 1000\r\n\r\n{")
            assert b" 408 " in slow.makefile("rb").readline()
        running.service.settings = usual
        assert client.post(CHAT, json=about_demo()).json()["choices"][0]["message"]["content"] == ANSWER


def test_nothing_of_a_request_in_the_log(client, caplog):
    with caplog.at_level(logging.DEBUG, logger="mcv_serve"):
        client.post(CHAT, json=text_chat("my secret is 4711", max_tokens=2))
        client.post(CHAT, json=text_chat("my secret is 4711", guided_regex="("))
        client.post("/api/generate", json={"prompt": "my secret is 4711", "images": ["4711"]})
    assert "4711" not in caplog.text


def test_what_nobody_foresaw_is_told_in_the_dialect(serving, monkeypatch, caplog):
    with serving() as running, running.client() as client:
        monkeypatch.setattr(running.service.engine, "submit", lambda *_: 1 / 0)
        monkeypatch.setattr(running.service.engine, "info", lambda: [][1], raising=True)
        found = client.post(CHAT, json=text_chat("my secret is 4711"))
        assert (found.status_code, found.json()["error"]["code"]) == (500, "internal_error")
        assert found.headers["x-content-type-options"] == "nosniff"
        assert "4711" not in caplog.text


# What is fetched


@pytest.mark.parametrize(
    "address",
    [
        "127.0.0.1", "127.8.8.8", "10.0.0.1", "172.16.3.4", "192.168.1.1", "169.254.169.254", "0.0.0.0", "100.64.0.1",
        "::1", "::", "fe80::1", "fe80::1%eth0", "fc00::1", "::ffff:127.0.0.1", "::ffff:8.8.8.8", "64:ff9b::7f00:1",
        "2002:7f00:1::", "224.0.0.1", "255.255.255.255", "192.0.2.1", "2001:db8::1",
    ],
)  # fmt: skip
def test_addresses_that_only_this_machine_reaches(address):
    assert not is_public(address)


@pytest.mark.parametrize("address", ["8.8.8.8", "1.1.1.1", "2606:4700:4700::1111"])
def test_addresses_of_the_wide_net(address):
    assert is_public(address)


class _Pictures(BaseHTTPRequestHandler):
    def do_GET(self):
        where = {"/to": "/demo", "/loop": "/loop", "/out": "https://evil.example/x", "/plain": "http://pictures.test/demo"}
        if self.path in where:
            self.send_response(302)
            self.send_header("Location", where[self.path])
            self.end_headers()
            return
        self.send_response(404 if self.path == "/missing" else 200)
        self.end_headers()
        self.wfile.write(b"\0" * 500_000 if self.path == "/large" else DEMO.read_bytes())

    def log_message(self, *_):
        pass


@contextmanager
def https(tmp_path):
    """A server of pictures at this machine, which a certificate says is pictures.test."""
    key, certificate = tmp_path / "key.pem", tmp_path / "certificate.pem"
    subprocess.run(
        ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj", "/CN=pictures.test",
         "-addext", "subjectAltName=DNS:pictures.test", "-keyout", key, "-out", certificate],
        check=True, capture_output=True,
    )  # fmt: skip
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate, key)
    server = HTTPServer(("127.0.0.1", 0), _Pictures)
    server.socket = context.wrap_socket(server.socket, server_side=True)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        trust = ssl.create_default_context(cafile=certificate)
        yield server.server_address[1], trust
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


@pytest.mark.waits
def test_fetching(tmp_path):
    with https(tmp_path) as (port, trust):

        def fetcher(public=lambda address: True, resolve=lambda host, port: ["127.0.0.1"], limit=100_000, context=trust):
            return Fetcher(
                ["pictures.test"], limit=limit, seconds=20, resolve=resolve, context=context, port=port, public=public
            )

        def refused(url, **how):
            with pytest.raises(ApiError) as caught:
                fetcher(**how)(url)
            return caught.value.code

        assert fetcher()("https://pictures.test/demo") == DEMO.read_bytes()
        assert fetcher()("https://pictures.test/to#y") == DEMO.read_bytes()
        assert refused("https://pictures.test/missing") == "image_unreachable"
        assert refused("https://pictures.test/loop") == "image_unreachable"
        assert refused("https://pictures.test/out") == "image_host_refused"
        assert refused("https://pictures.test/plain") == "invalid_image_url"
        assert refused("https://pictures.test/large") == "image_too_large"
        for url in (
            "http://pictures.test/demo",
            "https://me@pictures.test/",
            "https://pictures.test:22/x",
            "https://[",
            "https://",
        ):
            assert refused(url) in ("invalid_image_url", "image_host_refused")
        for host in ("evil.example", "pictures.test.evil.example", "127.0.0.1", "localhost"):
            assert refused(f"https://{host}/demo") == "image_host_refused"
        # a name that leads here, or both here and elsewhere
        assert refused("https://pictures.test/demo", public=is_public) == "image_host_refused"
        both = lambda host, port: ["8.8.8.8", "127.0.0.1"]  # noqa: E731
        assert refused("https://pictures.test/demo", public=is_public, resolve=both) == "image_host_refused"
        # another's certificate
        assert refused("https://pictures.test/demo", context=ssl.create_default_context()) == "image_unreachable"


def test_redirects_are_resolved_anew(tmp_path):
    """The second look-up leads to this machine: what was checked the first time does not count."""
    with https(tmp_path) as (port, trust):
        found = iter([["127.0.0.1"], ["127.0.0.2"]])
        fetcher = Fetcher(
            ["pictures.test"], limit=100_000, seconds=20, resolve=lambda host, port: next(found), context=trust, port=port,
            public=lambda address: address == "127.0.0.1",
        )  # fmt: skip
        with pytest.raises(ApiError) as caught:
            fetcher("https://pictures.test/to")
        assert caught.value.code == "image_host_refused"


def test_no_host_no_fetching():
    with pytest.raises(ApiError) as caught:
        Fetcher([], limit=1, seconds=1)("https://example.org/x.png")
    assert caught.value.code == "remote_images_disabled"


# A process for decoding


@pytest.mark.waits
def test_isolated_pictures_are_the_same(serving, engine):
    with serving(isolate=True) as running, running.client() as client:
        said = client.post(CHAT, json=about_demo("Describe the picture.")).json()
        assert said["choices"][0]["message"]["content"] == "a red circle and the text HELLO"
        video = {"type": "video_url", "video_url": {"url": "data:video/mp4;base64,AAAA"}}
        body = {"messages": [{"role": "user", "content": [video, {"type": "text", "text": "x"}]}]}
        assert client.post(CHAT, json=body).json()["error"]["code"] == "video_files_disabled"


@pytest.mark.waits
def test_the_isolated_process_can_open_nothing_and_is_replaced():
    decoder = IsolatedDecoder(1_000_000)
    try:
        assert decoder(DEMO.read_bytes()).size == (112, 112)
        first = decoder._process
        lines = Path(f"/proc/{first.pid}/limits").read_text().splitlines()[1:]
        limits = {line[:26].strip(): line[26:].split()[0] for line in lines}
        assert limits["Max open files"] == "0" and limits["Max processes"] == "0" and limits["Max file size"] == "0"
        first.kill()
        first.join()
        assert decoder(DEMO.read_bytes()).size == (112, 112)
        assert decoder._process is not first
    finally:
        decoder.close()


def test_a_failure_says_nothing_about_itself():
    for dialect in ("openai", "ollama"):
        assert "4711" not in json.dumps(ApiError.of(ValueError("4711")).body(dialect))
