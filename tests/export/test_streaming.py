"""Weights go into their file in pieces, by several threads: the file is the same however they are cut and whoever is first."""

import threading
from pathlib import Path

import pytest

from mcv_calibration.recipe import GraphRecipe, Recipe
from mcv_export import weights
from mcv_export.build import BuildOptions, build
from mcv_export.file_specs import file_spec, folder_specs
from mcv_export.workers import workers

RECIPE = Recipe(
    target="avx2",
    graphs={
        "vision_encoder": GraphRecipe(precision="int8-token"),
        "resampler": GraphRecipe(precision="fp32"),
        "decoder_with_past": GraphRecipe(precision="q4", layers={"layers.0": "fp32", "lm_head": "q8"}),
    },
)


def test_pieces_and_threads_do_not_show(golden_root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source, options = golden_root / "minicpmv2_6" / "checkpoint", BuildOptions(recipe=RECIPE)
    monkeypatch.setattr("mcv_export.workers.default_threads", lambda: 1)
    whole = build(source, tmp_path / "whole", options).manifest.files
    for threads, values in ((1, 500), (7, 3000)):
        monkeypatch.setattr("mcv_export.workers.default_threads", lambda threads=threads: threads)
        monkeypatch.setattr(weights, "PIECE_VALUES", values)
        monkeypatch.setattr(weights, "_COLUMN_VALUES", 4 * values)
        assert build(source, tmp_path / f"{threads}", options).manifest.files == whole


def test_what_has_not_begun_when_a_build_fails_never_will() -> None:
    """The one thread is busy until its pool is told to end, which cancels what waits before it waits for the thread."""
    ran: list[int] = []
    with pytest.raises(ZeroDivisionError), workers(1) as pool:
        release = threading.Event()
        pool.submit(release.wait)
        waiting = pool.submit(ran.append, 1)
        waiting.add_done_callback(lambda _: release.set())
        raise ZeroDivisionError
    assert waiting.cancelled()
    assert ran == []


def test_files_that_nobody_changed_are_hashed_once(tmp_path: Path) -> None:
    (tmp_path / "onnx").mkdir()
    for name in ("a", "onnx/b"):
        (tmp_path / name).write_text(name)
    known = folder_specs(tmp_path)
    assert list(known) == ["a", "onnx/b"]
    (tmp_path / "a").write_text("other")
    (tmp_path / "c").write_text("new")
    with workers(2) as pool:
        found = folder_specs(tmp_path, pool, known)
    assert found == {**known, "c": file_spec(tmp_path / "c")}
    assert list(found) == ["a", "c", "onnx/b"]
