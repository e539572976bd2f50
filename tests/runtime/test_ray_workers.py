"""Who answers what when workers of Ray come and go: with a stand-in for Ray, and, where it is installed, a cluster."""

import importlib.util
import json
import pickle
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from mcv_runtime import Document, OptionError, Options, Request, RunError, Video
from mcv_runtime.batch.rows import BatchRow
from mcv_runtime.distributed import ray_workers
from mcv_runtime.distributed.ray_workers import RayWorkers

DEMO = Path(__file__).parents[2] / "models" / "tiny" / "demo.png"


class RayError(Exception):
    """What Ray says of a worker that is gone."""


class Ref:
    """What Ray gives for work that is to be done."""

    def __init__(self, do):
        self.do = do


class FakeRay:
    """A cluster in this process: a worker's work is done when somebody waits for it, unless it dies first."""

    def __init__(self, dies=lambda worker, prompts: False, cpus=8):
        self.dies, self.cpus, self.made, self.given = dies, cpus, [], []
        self.exceptions = SimpleNamespace(
            RayError=RayError,
            **{name: type(name, (RayError,), {}) for name in ("LocalRayletDiedError", "RaySystemError", "RayTaskError")},
        )

    def is_initialized(self):
        return True

    def nodes(self):
        return [{"Alive": True, "Resources": {"CPU": self.cpus}}, {"Alive": False, "Resources": {"CPU": 64}}]

    def remote(self, **given):
        self.options = given
        return lambda kind: SimpleNamespace(remote=self._make)

    def _make(self, bundle, load_options, size):
        number = len(self.made)
        self.given.append(load_options)
        worker = SimpleNamespace(number=number, alive=True)
        worker.identity = SimpleNamespace(remote=lambda: Ref(lambda: ("model", "", load_options["threads"])))
        worker.answer = SimpleNamespace(remote=lambda requests: Ref(lambda: self._answer(worker, requests)))
        self.made.append(worker)
        return worker

    def _answer(self, worker, requests):
        prompts = [pickle.loads(pickle.dumps(one)).prompt for one in requests]
        if not worker.alive or self.dies(worker.number, prompts):
            worker.alive = False
            raise RayError("gone")
        return [{"answer": prompt} for prompt in prompts]

    def get(self, one):
        return one.do()

    def wait(self, all_of_them, num_returns):
        return all_of_them[-1:], all_of_them[:-1]  # the last first: nobody promises an order

    def kill(self, worker):
        worker.alive = False


def workers_of(monkeypatch, ray, size=3, **more):
    monkeypatch.setattr(ray_workers, "_ray", lambda: ray)
    return RayWorkers(Path("bundle"), {"threads": 2}, size, model="model", **more)


def rows(count):
    return [BatchRow(number=at, digest="", request=Request([], f"row {at}", None, Options())) for at in range(count)]


def answers(workers, count):
    asked = [workers.ask(row) for row in rows(count)]
    for at in range(count):
        workers.wait(asked[at:])
    return [workers.fields(one) for one in asked]


def test_every_row_has_its_answer_whichever_chunk_is_done_first(monkeypatch):
    ray = FakeRay()
    with workers_of(monkeypatch, ray) as workers:
        assert answers(workers, 40) == [{"answer": f"row {at}"} for at in range(40)]
    assert len(ray.made) == 4 and not any(worker.alive for worker in ray.made)
    assert (ray.options["num_cpus"], ray.given[0]["threads"], workers.threads) == (2, 2, 2)


def test_what_a_dead_worker_had_is_asked_again(monkeypatch):
    died = set()

    def once(worker, prompts):
        return worker < 3 and (worker in died or died.add(worker) is None)

    ray = FakeRay(once)
    with workers_of(monkeypatch, ray) as workers:
        assert answers(workers, 40) == [{"answer": f"row {at}"} for at in range(40)]
    assert len(ray.made) == 4 + 3


def test_a_row_that_kills_whoever_answers_it_is_an_error_and_no_other_is(monkeypatch):
    ray = FakeRay(lambda _, prompts: "row 7" in prompts)
    with workers_of(monkeypatch, ray, size=4, workers=1) as workers:
        found = answers(workers, 20)
    assert "4 workers have died" in found.pop(7)
    assert found == [{"answer": f"row {at}"} for at in range(20) if at != 7]


def test_a_cluster_that_is_gone_ends_the_batch_in_one_line(monkeypatch):
    ray = FakeRay()

    def gone(worker, prompts):
        raise ray.exceptions.LocalRayletDiedError("at some place\nno raylet")

    ray.dies = gone
    with workers_of(monkeypatch, ray) as workers, pytest.raises(RunError, match=r"gone \(no raylet\); the same command"):
        answers(workers, 4)


def test_what_cannot_be_is_said_before_any_row(monkeypatch):
    with pytest.raises(OptionError, match="no machine of the cluster has 2 CPUs"):
        workers_of(monkeypatch, FakeRay(cpus=1))
    ray = FakeRay()
    monkeypatch.setattr(ray_workers, "_ray", lambda: ray)
    with pytest.raises(OptionError, match="has another one"):
        RayWorkers(Path("bundle"), {"threads": 2}, 1, model="another")
    if importlib.util.find_spec("ray") is None:
        monkeypatch.undo()
        with pytest.raises(OptionError, match=r"minicpmv-onnx\[ray\]"):
            RayWorkers(Path("bundle"), {}, 1, model="model")


def test_requests_travel_as_paths_and_numbers_of_pages(monkeypatch, tmp_path):
    monkeypatch.chdir(DEMO.parent)
    (page,) = Document(Path("demo.png")).open()
    request = Request([Path("demo.png"), page, b"data", Video(Path("a.mp4"))], "What?", None, Options())
    path, document, data, video = pickle.loads(pickle.dumps(ray_workers._portable(request))).images
    assert (path, document.source, document.pages, data, video.source) == (DEMO, DEMO, [1], b"data", DEMO.parent / "a.mp4")
    messages = [{"role": "user", "content": [Path("demo.png"), "What?"]}, {"role": "assistant", "content": "A circle."}]
    (first, second) = ray_workers._portable(Request(messages=messages)).messages
    assert (first["content"], second["content"]) == ([DEMO, "What?"], "A circle.")


@pytest.mark.waits
@pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="no Ray here: pip install '.[ray]'")
def test_a_cluster_answers_as_one_process_does(tmp_path):
    questions = ["What does the text say?", "Describe the picture.", "How many shapes are there?"]
    asked = [{"id": at, "image": str(DEMO), "prompt": questions[at % 3], "max_new_tokens": 4} for at in range(20)]
    (tmp_path / "in.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in [*asked, {"image": "gone.png"}]))

    def run(name, *more):
        command = [sys.executable, "-m", "mcv_runtime.command.cli", "--batch", str(tmp_path / "in.jsonl"), "--out", name]
        done = subprocess.run([*command, "--threads", "1", *more], cwd=tmp_path, capture_output=True, text=True)
        assert done.returncode == 1, done.stderr
        return [{**json.loads(line), "timings": None} for line in (tmp_path / name).read_text().splitlines()]

    assert run("ray.jsonl", "--engine", "ray", "--workers", "2", "--batch-size", "3") == run("here.jsonl")
