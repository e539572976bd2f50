"""The command as a process: signals, restarts, and folders that it shares or cannot write."""

import json
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import threading
import time
from contextlib import contextmanager
from functools import partial

import httpx
import pytest
from tiny_server import ANSWER, about_demo, endless

from mcv_runtime.bundle.folder import DEFAULT

pytestmark = pytest.mark.waits
CHAT = "/v1/chat/completions"


class Command:
    """`mcv-serve` with those arguments, and a client of it once it is ready."""

    def __init__(self, *arguments, file_bytes=None, **environment):
        self.process = subprocess.Popen(
            [sys.executable, "-m", "mcv_serve.command", "--port", "0", "--threads", "1", *map(str, arguments)],
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, **environment},
            preexec_fn=file_bytes and partial(resource.setrlimit, resource.RLIMIT_FSIZE, (file_bytes, file_bytes)),
        )
        self.log = []
        port = None
        for line in self.process.stderr:
            self.log.append(line)
            if found := re.search(r"running on http://127\.0\.0\.1:(\d+)", line):
                port = found[1]
            if "is ready" in line:
                break
        assert port, "".join(self.log)
        self.client = httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=120, trust_env=False)
        self._reading = threading.Thread(target=lambda: self.log.extend(self.process.stderr))
        self._reading.start()

    def ended(self, number=signal.SIGTERM):
        self.process.send_signal(number)  # nothing happens to one that has ended
        code = self.process.wait()
        self._reading.join()
        if not self.process.stderr.closed:
            self.process.stderr.close()
        self.client.close()
        return code


@contextmanager
def command(*arguments, **more):
    running = Command(*arguments, **more)
    try:
        yield running
    finally:
        running.ended(signal.SIGKILL)


def ask(running, **more):
    said = running.client.post(CHAT, json=about_demo(**more)).json()
    assert said["choices"][0]["message"]["content"] == ANSWER
    return said


def test_sigterm_lets_what_runs_finish_and_exits_0():
    with command() as running:
        with running.client.stream("POST", CHAT, json=endless(stream=True)) as response:
            lines = response.iter_lines()
            while '"content":"a' not in next(lines):
                pass
            running.process.send_signal(signal.SIGTERM)
            rest = list(lines)
        assert rest[-2:] == ["data: [DONE]", ""]
        assert any('"finish_reason":"stop"' in line for line in rest)
        assert running.process.wait() == 0
        assert "Hello" not in "".join(running.log)  # nothing of what was asked


def test_sigterm_under_load_ends_what_takes_longer_with_a_line_that_says_so():
    with command("--drain", "0") as running:
        body = {**endless(stream=True), "guided_regex": "(ab){1500}", "max_tokens": 3000}
        with running.client.stream("POST", CHAT, json=body) as response:
            lines = response.iter_lines()
            while '"content":"a' not in next(lines):
                pass
            running.process.send_signal(signal.SIGTERM)
            rest = [line for line in lines if line.startswith("data: ")]
        assert json.loads(rest[-2][6:])["error"]["code"] == "shutting_down"
        assert running.process.wait() == 0


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_state_after_a_restart(tmp_path, number):
    state = tmp_path / "state"
    arguments = ("--cache-dir", tmp_path / "pictures", "--save-state", state, "--save-every", "0.05")
    with command(*arguments) as running:
        first = ask(running)
        if number == signal.SIGKILL:
            while not state.exists():  # written while nobody asks
                time.sleep(0.01)
        assert running.ended(number) == (0 if number == signal.SIGTERM else -signal.SIGKILL)
    with command(*arguments) as running:
        again = ask(running)
        usage = again["usage"]["prompt_tokens_details"]
        assert usage["cached_tokens"] == first["usage"]["prompt_tokens"] - 1
        assert 'mcv_pictures_total{cache="hit"} 1.0' in running.client.get("/metrics").text
        assert running.ended() == 0
    assert [path for path in tmp_path.iterdir() if path.name not in ("state", "pictures")] == []


def test_damaged_state_is_a_line_in_the_log(tmp_path):
    state = tmp_path / "state"
    state.write_bytes(b"mcv-state 1\nrubbish")
    with command("--save-state", state) as running:
        ask(running)
        assert running.ended() == 0
        assert any("damaged" in line and "WARNING" in line for line in running.log)


def test_two_servers_on_one_cache_folder(tmp_path):
    with command("--cache-dir", tmp_path) as first, command("--cache-dir", tmp_path) as second:
        ask(first)
        ask(second)
        assert 'mcv_pictures_total{cache="hit"} 1.0' in second.client.get("/metrics").text
        assert 'mcv_pictures_total{cache="miss"} 1.0' in first.client.get("/metrics").text
        assert (first.ended(), second.ended()) == (0, 0)
    assert len(list(tmp_path.iterdir())) == 1


def test_a_full_disk_costs_what_would_be_kept_and_no_answer(tmp_path):
    """A limit of the size of a file lets a write fail halfway, as a full disk does."""
    pictures, state = tmp_path / "pictures", tmp_path / "state"
    with command("--cache-dir", pictures, "--save-state", state, "--save-every", "0.05", file_bytes=4096) as running:
        ask(running)
        ask(running)
        assert running.client.get("/ready").status_code == 200
        assert running.ended() == 0
        assert any("WARNING" in line and str(state) in line for line in running.log)
        assert not any("Traceback" in line for line in running.log)
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []


def test_bundle_that_changes_while_it_is_served(tmp_path):
    folder = tmp_path / "bundle"
    shutil.copytree(DEFAULT, folder)
    with command(folder) as running:
        ask(running)
        for path in [*folder.glob("onnx/*"), folder / "tokenizer.json"]:
            other = tmp_path / "other"
            other.write_bytes(b"\0" * 100)
            other.replace(path)
        ask(running)
        assert running.client.get("/ready").status_code == 200
        assert running.ended() == 0
    done = subprocess.run([sys.executable, "-m", "mcv_serve.command", folder], capture_output=True, text=True)
    assert done.returncode == 2  # and is refused the next time
    assert done.stderr.splitlines()[-1].startswith("mcv-serve: ")


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["/nowhere"], "mcv-serve: "),
        (["--queue", "-1"], "mcv-serve: queue"),
        (["--allow-image-host", "https://x.org/"], "mcv-serve: --allow-image-host takes the name of a host"),
        (["--api-key", ""], "mcv-serve: an API key is empty"),
        (["--api-key-file", "/nowhere"], "mcv-serve: /nowhere is not there"),
        (["--kv", "int3"], "mcv-serve: kv must be"),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_2(arguments, line):
    done = subprocess.run(
        [sys.executable, "-m", "mcv_serve.command", "--port", "0", *arguments], capture_output=True, text=True
    )
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.splitlines()[-1].startswith(line), done.stderr
    assert "Traceback" not in done.stderr


def test_keys_from_the_environment_and_a_file(tmp_path):
    keys = tmp_path / "keys"
    keys.write_text("# keys\nfrom-file\n\n")
    with command("--api-key-file", keys, MCV_API_KEY="from-environment") as running:
        for key, status in (("from-file", 200), ("from-environment", 200), ("# keys", 401), ("from", 401)):
            headers = {"authorization": f"Bearer {key}"}
            assert running.client.get("/v1/models", headers=headers).status_code == status
        assert running.ended() == 0
