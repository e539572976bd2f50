"""`optimum-cli export mcv`, through the real program."""

import subprocess
import sys
from argparse import ArgumentParser
from pathlib import Path

import pytest

from mcv_export.build import BuildOptions, build
from mcv_export.optimum_command import ExportMcv
from mcv_export.precision import DEFAULT, Wishes
from mcv_runtime.bundle.folder import Bundle
from mcv_runtime.errors import OptionError

pytestmark = pytest.mark.waits


def _optimum(*arguments: object) -> subprocess.CompletedProcess[str]:
    program = Path(sys.executable).parent / "optimum-cli"
    return subprocess.run([program, "export", *map(str, arguments)], capture_output=True, text=True, check=False)


@pytest.fixture(scope="module")
def source(golden_root: Path) -> Path:
    return golden_root / "minicpmv2_6" / "checkpoint"


def test_the_bundle_is_the_one_that_mcv_export_builds(source: Path, tmp_path: Path) -> None:
    options = ["--task", "image-text-to-text", "--weight-format", "int8", "--decoder", "int4", "--group-size", "64"]
    done = _optimum("mcv", "-m", source, *options, tmp_path / "bundle")
    assert done.returncode == 0, done.stderr
    assert "decoder_with_past_q4.onnx" in done.stdout
    assert all(graph in done.stderr for graph in ("vision_encoder", "resampler", "decoder_with_past")), "no progress"
    vision = {"vision_encoder": "int8-token", "resampler": "int8-token"}
    expected = build(
        source, tmp_path / "expected", BuildOptions(precision={**vision, "decoder_with_past": "q4"}, block_size=64)
    ).manifest
    found = Bundle.open(tmp_path / "bundle").manifest
    assert found.files == expected.files
    assert found.graphs == expected.graphs


@pytest.mark.parametrize(
    ("arguments", "vision", "decoder"),
    [
        (["--weight-format", "int8"], "int8-token", "q8"),
        (["--weight-format", "int4"], DEFAULT["vision_encoder"], "q4"),
        (["--weight-format", "int4", "--vision", "int4", "--decoder", "int8"], "q4", "q8"),
        (["--weight-format", "fp32", "--decoder", "int8"], "fp32", "q8"),
        ([], DEFAULT["vision_encoder"], "q4"),
    ],
)
def test_formats_are_those_that_are_fast(
    arguments: list[str], vision: str, decoder: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """8 bits of a tower are integers all through: in blocks it takes longer than in float. 4 bits are the decoder's alone."""
    made: list[BuildOptions] = []
    monkeypatch.setattr("mcv_export.hub.locate", lambda *_, **__: tmp_path)

    def note(folder: Path, out: Path, options: BuildOptions, **_: object) -> None:
        made.append(options)
        raise OptionError("noted")

    monkeypatch.setattr("mcv_export.build.build", note)
    parser = ArgumentParser()
    ExportMcv.parse_args(parser)
    command = ExportMcv.__new__(ExportMcv)
    command.args = parser.parse_args(["-m", "model", str(tmp_path / "out"), *arguments])
    with pytest.raises(OptionError, match="noted"):
        command._build()
    graphs = made[0].chosen().graphs
    found = {name: graphs[name].precision for name in ("vision_encoder", "resampler", "decoder_with_past")}
    resampler = vision if "--vision" not in arguments else DEFAULT["resampler"]
    assert found == {"vision_encoder": vision, "resampler": resampler, "decoder_with_past": decoder}
    if not arguments:
        assert graphs == Wishes().recipe().graphs


def test_a_mistake_is_one_line(source: Path, tmp_path: Path) -> None:
    for arguments, said in (
        (("-m", tmp_path / "nothing", tmp_path / "bundle"), "neither a folder nor a hub id"),
        (("-m", "openbmb/MiniCPM-V-2_6-int4", tmp_path / "bundle"), "full-precision checkpoint, openbmb/MiniCPM-V-2_6"),
    ):
        done = _optimum("mcv", *arguments)
        assert done.returncode == 2
        assert done.stdout == ""
        assert [line for line in done.stderr.splitlines() if line][-1].startswith("optimum-cli export mcv: ")
        assert said in done.stderr
        assert "Traceback" not in done.stderr
        assert list(tmp_path.iterdir()) == []


def test_a_command_line_that_makes_no_sense(tmp_path: Path) -> None:
    for arguments in (("mcv", tmp_path), ("mcv", "-m", tmp_path, "--task", "text-generation", tmp_path)):
        assert _optimum(*arguments).returncode == 2


def test_the_namespace_has_no_init_file() -> None:
    """With one, this distribution would hide optimum itself."""
    namespace = Path(__file__).parents[2] / "export" / "optimum"
    assert [path.name for path in namespace.rglob("*.py")] == ["register_mcv.py"]
