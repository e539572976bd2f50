"""`optimum-cli export mcv`, through the real program."""

import subprocess
import sys
from pathlib import Path

import pytest

from mcv_export.build import BuildOptions, build
from mcv_runtime.bundle.folder import Bundle

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
    precision = BuildOptions(precision={"vision_encoder": "q8", "resampler": "q8", "decoder_with_past": "q4"}, block_size=64)
    expected = build(source, tmp_path / "expected", precision).manifest
    found = Bundle.open(tmp_path / "bundle").manifest
    assert found.files == expected.files
    assert found.graphs == expected.graphs


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
