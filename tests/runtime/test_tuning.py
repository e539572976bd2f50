"""`mcv-run tune`: what it decides, what it leaves in the cache folder, and who uses that."""

import json
import logging
import os
import subprocess
import sys
from dataclasses import replace
from itertools import pairwise

import pytest

from mcv_runtime import Bundle, OutputError, load
from mcv_runtime.sessions import profile as profiles
from mcv_runtime.sessions.profile import Profile, find_profile, keep_profile, machine_of, processor, profile_path
from mcv_runtime.tuning.tune import Trial, _Race, thread_numbers, tune

RUN = [sys.executable, "-c", "from mcv_runtime.command.cli import main; main()"]


@pytest.fixture(autouse=True)
def _fresh_cache(monkeypatch, tmp_path):
    monkeypatch.setenv("MCV_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def bundle(golden_bundle):
    return Bundle.open(golden_bundle)


@pytest.fixture
def profile(bundle):
    return Profile(threads=1, prefill_chunk=96, batch_slices=2, kv="float", machine=machine_of(bundle))


def test_an_engine_uses_what_was_found_for_what_it_is_not_told(golden_bundle, profile):
    before = load(golden_bundle, threads=2).info()
    assert (before.tuned, before.prefill_chunk, before.kv) == (False, 512, "float")
    keep_profile(profile)
    found = load(golden_bundle).info()
    assert (found.tuned, found.threads, found.prefill_chunk) == (True, 1, 96)
    assert load(golden_bundle, threads=2).info().threads == 2
    assert not load(golden_bundle, tuned=False).info().tuned
    own = load(golden_bundle, session_factory=lambda path, options: pytest.importorskip("onnxruntime").InferenceSession(path))
    assert not own.info().tuned


def pieces(engine, prompt, **options):
    """The lengths of the pieces in which a prompt is read, but for the first, which goes on from what is known."""
    ends = []
    answer = engine.ask(None, prompt, progress=lambda e: ends.append(e.done) if e.stage == "prompt" else None, **options)
    return answer.tokens, [end - start for start, end in pairwise(ends)]


def test_pieces_of_a_prompt_are_as_long_as_was_found(golden_bundle, profile):
    whole = load(golden_bundle).ask(None, "? " * 300, max_new_tokens=4)
    keep_profile(replace(profile, prefill_chunk=16))
    engine = load(golden_bundle)
    tokens, lengths = pieces(engine, "? " * 300, max_new_tokens=4)
    assert max(lengths) == 16
    assert tokens == whole.tokens
    assert max(pieces(engine, "! " * 60, max_new_tokens=1, prefill_chunk=8)[1]) == 8


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"threads": 0}, "threads"),
        ({"threads": True}, "threads"),
        ({"prefill_chunk": 1 << 30}, "prefill_chunk"),
        ({"kv": "int4"}, "int4"),
        ({"kv": "int8"}, "no graph for kv='int8'"),
        ({"machine": "0" * 64}, "measured elsewhere"),
        ({"hook": "x"}, "unknown key"),
        ("{", "not JSON"),
        ("[]", "must be an object"),
        ('{"threads": ' + "1" * 5000 + "}", "at most"),
    ],
)
def test_a_strange_profile_is_passed_over_with_a_line(bundle, profile, caplog, change, said):
    path = keep_profile(profile)
    told = change if isinstance(change, str) else json.dumps(json.loads(path.read_text()) | change)
    path.write_text(told)
    with caplog.at_level(logging.WARNING):
        assert find_profile(bundle) is None
    (line,) = [record.getMessage() for record in caplog.records]
    assert said in line
    assert "mcv-run tune" in line and "\n" not in line
    assert not load(bundle.folder).info().tuned


def test_what_is_no_file_of_ours_is_passed_over(bundle, profile, caplog, tmp_path, monkeypatch):
    path = keep_profile(profile)
    kept = path.rename(tmp_path / "elsewhere")
    path.symlink_to(kept)
    assert find_profile(bundle) is None
    path.unlink()
    path.mkdir()
    assert find_profile(bundle) is None
    path.rmdir()
    assert len(caplog.records) == 2
    kept.rename(path)
    assert find_profile(bundle) == profile
    monkeypatch.setattr(profiles.os, "getuid", lambda: path.stat().st_uid + 1)
    assert find_profile(bundle) is None
    assert "another user's" in caplog.records[-1].getMessage()


def test_another_machine_or_bundle_has_no_profile(bundle, profile, caplog, monkeypatch):
    keep_profile(profile)
    monkeypatch.setattr(profiles, "default_threads", lambda root: 77)
    assert find_profile(bundle) is None
    assert not caplog.records


def test_a_processor_is_told_by_what_does_not_change(tmp_path):
    file = tmp_path / "proc/cpuinfo"
    file.parent.mkdir()
    text = "processor\t: 0\nmodel name\t: AMD EPYC\ncpu MHz\t\t: {}\nflags\t\t: sse {}\n\nprocessor\t: 1\n"
    told = []
    for mhz, flags in ((2000, "avx2"), (3000, "avx2"), (2000, "avx512f")):
        file.write_text(text.format(mhz, flags))
        told.append(processor(tmp_path))
    assert told[0] == told[1] == "model name: AMD EPYC\nflags: sse avx2"
    assert told[2] != told[0]
    assert processor(tmp_path / "nowhere")


def test_only_so_many_are_kept(profile):
    for number in range(profiles._KEPT + 5):
        os.utime(keep_profile(replace(profile, machine=f"{number:064x}")), (number, number))
    last = keep_profile(profile)
    names = sorted(path.name for path in last.parent.iterdir())
    assert len(names) == profiles._KEPT
    assert last.name in names
    assert profile_path(f"{0:064x}").name not in names


def test_where_nothing_can_be_written(profile, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("MCV_CACHE", str(tmp_path / "file"))
    with pytest.raises(OutputError, match="cannot be written"):
        keep_profile(profile)


def test_threads_that_are_tried():
    assert thread_numbers(1, 1) == (1,)
    assert thread_numbers(2, 2) == (2, 1)
    assert thread_numbers(8, 16) == (8, 7, 4, 16)
    assert thread_numbers(0, 4) == (4, 3, 2)


@pytest.mark.parametrize(("seconds", "chosen"), [({4: 1.0, 2: 0.99}, 4), ({4: 1.0, 2: 0.9, 1: 0.8}, 1), ({4: 1.0, 2: 2.0}, 4)])
def test_only_what_is_clearly_faster_replaces_the_default(seconds, chosen):
    race = _Race(3600, lambda *_: None)
    best = race.run("threads", list(seconds), lambda value: Trial(value=value, step_s=seconds[value]), rounds=2)
    assert best.value == chosen
    assert [trial.value for trial in race.trials if trial.chosen] == [chosen]
    assert [trial.value for trial in race.trials] == list(seconds)


def test_the_fastest_round_counts():
    times = iter([1.0, 3.0, 2.0, 0.5])
    race = _Race(3600, lambda *_: None)
    best = race.run("batch_slices", [1, 2], lambda value: Trial(value=value, slice_s=next(times)), rounds=2)
    assert (best.value, best.slice_s) == (2, 0.5)
    assert [trial.slice_s for trial in race.trials] == [1.0, 0.5]


def test_without_time_the_defaults_stay(bundle):
    found = tune(bundle, seconds=0, threads=(2, 1))
    assert not found.complete
    assert (found.profile.threads, found.profile.prefill_chunk, found.profile.batch_slices) == (2, 512, 1)
    assert [trial.value for trial in found.trials] == [2, 512, 1]


def test_everything_is_tried(bundle):
    shown = []
    found = tune(bundle, seconds=3600, threads=(1,), show=lambda text, done, total: shown.append((text, total)))
    assert found.complete
    assert [trial.setting for trial in found.trials if trial.chosen] == ["threads", "prefill_chunk", "batch_slices"]
    assert [trial.value for trial in found.trials if trial.setting == "batch_slices"] == [1, 2, 4]
    assert {text for text, _ in shown} >= {"threads 1", "prefill_chunk 512", "batch_slices 4"}
    assert all(trial.question_s > 0 for trial in found.trials)
    assert find_profile(bundle) is None  # only the command keeps it


@pytest.mark.waits
def test_the_command(golden_bundle, bundle):
    def run(*arguments):
        return subprocess.run([*RUN, *map(str, arguments)], capture_output=True, text=True, encoding="utf-8")

    done = run("tune", golden_bundle)
    assert (done.returncode, done.stdout.split()[0]) == (0, "setting")
    kept = find_profile(bundle)
    assert str(profile_path(kept.machine)) in done.stderr
    assert load(golden_bundle).info().tuned
    told = json.loads(run("tune", golden_bundle, "--json", "--seconds", 0.001).stdout)
    assert (told["complete"], told["profile"]["prefill_chunk"]) == (False, 512)
    assert {trial["setting"] for trial in told["trials"]} == {"threads", "prefill_chunk", "batch_slices"}
    for wrong in (["--seconds", "nan"], ["--seconds", 0], ["--what"], [golden_bundle / "nowhere"]):
        done = run("tune", *wrong)
        assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1)
    assert "mcv-run tune" in run("--help").stdout
