"""`mcv-export report`: against a bundle in fp32 or the checkpoint, into the bundle, and the gate."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from mcv_calibration.gate import Gate
from mcv_calibration.samples import folder_samples
from mcv_export.report import judge
from mcv_runtime.bundle.folder import Bundle
from mcv_runtime.errors import GateError

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def q8(bundle_of: Callable[..., Path], tmp_path: Path) -> Path:
    folder = tmp_path / "q8"
    shutil.copytree(bundle_of("minicpmv2_6", "q8"), folder)
    return folder


@pytest.fixture
def pictures(golden_root: Path, tmp_path: Path) -> Path:
    """Two pictures, a file that only says it is one, and questions with a known answer."""
    folder = tmp_path / "pictures"
    folder.mkdir()
    for picture in sorted((golden_root / "images").glob("*.png"))[:2]:
        shutil.copyfile(picture, folder / picture.name)
    (folder / "broken.png").write_bytes(b"no picture")
    rows = [{"image": path.name, "prompt": "What is it?", "answer": "a thing"} for path in sorted(folder.glob("*.png"))]
    (folder / "questions.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return folder


def test_into_the_bundle_and_again(q8: Path, pictures: Path, bundle_of: Callable[..., Path], run: Run) -> None:
    fp32 = bundle_of("minicpmv2_6")
    before = Bundle.open(q8).manifest.files
    for _ in range(2):
        code, out, err = run("report", q8, fp32, "--calibration", pictures, "-n", 3, "-t", 2)
        assert code == 0
        assert "1 samples skipped: broken.png" in err
        assert f"see {q8}/report.html" in out
        assert "the layers that cost most are" in out
        bundle = Bundle.open(q8)
        assert set(bundle.manifest.files) == {*before, "report.json", "report.html"}
        assert len(list(bundle.verify())) == len(before) + 2
        assert [path.name for path in q8.iterdir() if path.name.startswith(".")] == []
    assert not (fp32 / "report.json").exists()
    report = json.loads((q8 / "report.json").read_text(encoding="utf-8"))
    assert report["reference"]["name"] == fp32.name
    assert [bundle["name"] for bundle in report["bundles"]] == ["q8"]


def test_against_the_checkpoint(q8: Path, pictures: Path, golden_root: Path, bundle_of: Callable[..., Path], run: Run) -> None:
    """As against a bundle in fp32 made of it: the same distributions, within what rounding does."""
    questions = ("--calibration", pictures, "--prompts", pictures / "questions.jsonl", "-n", 3, "-t", 2, "--json")
    out = q8.parent / "out"
    model = golden_root / "minicpmv2_6" / "checkpoint"
    code, printed, _ = run("report", q8, "--model", model, "--out", out, "--blocks", *questions)
    assert code == 0
    assert printed == (out / "report.json").read_text(encoding="utf-8")
    by_model = json.loads(printed)
    by_bundle = json.loads(run("report", bundle_of("minicpmv2_6"), q8, *questions, "--out", out)[1])
    assert by_model["reference"]["speed"] is None
    assert [a["text"] for a in by_model["reference"]["answers"]] == [a["text"] for a in by_bundle["reference"]["answers"]]
    assert [sample["answer"] for sample in by_model["samples"]] == ["a thing", "a thing"]
    found = by_model["bundles"][0]["blocks"]
    blocks = {(graph["graph"], *block["layers"]): block for graph in found for block in graph["blocks"]}
    named = {("vision_encoder", "layers.0"), ("resampler", "v_proj", "out_proj"), ("decoder_with_past", "lm_head")}
    assert named <= blocks.keys()
    assert all((block["kl_mean"] or block["relative"]) > 0 for block in blocks.values())
    (decoder,) = (graph for graph in found if graph["graph"] == "decoder_with_past")
    assert decoder["vectors"] == 2 * 3
    assert decoder["together"]["kl_mean"] == pytest.approx(by_model["bundles"][0]["accuracy"]["decoder"]["kl_mean"], rel=0.6)
    ours, theirs = by_model["bundles"][0], by_bundle["bundles"][0]
    for part in ("decoder", "pictures", "together"):
        # six tokens, and activations that are rounded to 8 bits: a last bit of the input moves the divergence by a third
        assert ours["accuracy"][part]["kl_mean"] == pytest.approx(theirs["accuracy"][part]["kl_mean"], rel=0.6)
    assert [layer["path"] for layer in ours["layers"]] == [layer["path"] for layer in theirs["layers"]]
    assert [layer["relative"] for layer in ours["layers"]] == pytest.approx(
        [layer["relative"] for layer in theirs["layers"]], rel=0.1, abs=1e-5
    )


def test_the_gate(q8: Path, bundle_of: Callable[..., Path], golden_root: Path, tmp_path: Path, run: Run) -> None:
    arguments = ("report", bundle_of("minicpmv2_6"), q8, "--num-samples", 1, "-n", 2, "-t", 2, "--out", tmp_path / "out")
    code, _, err = run(*arguments, "--max-kl", "1e-9")
    assert code == 3
    last = err.strip().splitlines()[-1]
    assert last.startswith("mcv-export: q8 misses its gate: its KL divergence ")
    assert last.count("(q8, +") == 3
    assert (tmp_path / "out" / "report.html").exists()
    assert run(*arguments, "--max-kl", "1e9", "--min-agreement", "0")[0] == 0


def test_a_bundle_that_is_refused_holds_no_report(q8: Path, golden_root: Path, pictures: Path) -> None:
    samples = folder_samples(pictures, count=1)
    model = golden_root / "minicpmv2_6" / "checkpoint"
    with pytest.raises(GateError, match="mine misses its gate"):
        judge(q8, "mine", model, samples, Gate(max_kl=0))
    assert not (q8 / "report.json").exists()


def test_nothing_to_compare_with(q8: Path, bundle_of: Callable[..., Path], run: Run) -> None:
    code, _, err = run("report", q8)
    assert code == 2
    assert "name a bundle in fp32" in err and "--model" in err
    code, _, err = run("report", bundle_of("minicpmv2_6"))
    assert code == 2
    assert "nothing to be compared with" in err
    code, _, err = run("report", q8, q8, bundle_of("minicpmv2_6"))
    assert code == 2
    assert "--out FOLDER" in err
    code, _, err = run("report", q8, bundle_of("minicpmv2_6"), "--blocks")
    assert code == 2
    assert "name it with --model" in err


@pytest.mark.parametrize("name", ["report.json", "report.html"])
def test_a_report_of_somebody_else_stays(name: str, q8: Path, bundle_of: Callable[..., Path], tmp_path: Path, run: Run) -> None:
    (tmp_path / name).write_text('{"mine": 1}')
    code, _, err = run("report", q8, bundle_of("minicpmv2_6"), "--out", tmp_path)
    assert code == 2
    assert "none of a bundle" in err
    assert [path.read_text() for path in tmp_path.iterdir() if path.is_file()] == ['{"mine": 1}']


def test_a_checkpoint_of_another_model(q8: Path, golden_root: Path, run: Run) -> None:
    code, _, err = run("report", q8, "--model", golden_root / "minicpmv4_6" / "checkpoint")
    assert code == 2
    assert "their shapes differ" in err
