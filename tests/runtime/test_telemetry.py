"""Nothing is written on, or sent from, a user's machine that he was not told of: ONNX Runtime's records of its use are off."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.waits
DEMO = Path(__file__).parents[2] / "models" / "tiny" / "demo.png"
BUNDLE = Path(__file__).parents[2] / "runtime" / "mcv_runtime" / "default_bundle"
CHECKPOINT = Path(__file__).parents[2] / "models" / "tiny" / "checkpoint"
VARIABLES = ("ORT_DISABLE_TELEMETRY", "HF_HUB_DISABLE_TELEMETRY")


def run(code, home, *arguments):
    environment = {name: value for name, value in os.environ.items() if name not in VARIABLES and not name.startswith("XDG_")}
    command = [sys.executable, "-c", code, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, env={**environment, "HOME": str(home)})
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize(
    ("module", "arguments"),
    [
        ("mcv_runtime.command.cli", ["--image", DEMO, "-p", "What does the text say?", "-t", 1]),
        ("mcv_export.cli", ["report", BUNDLE, "--model", CHECKPOINT, "--num-samples", 1, "-n", 1, "--out", "report"]),
    ],
)
def test_commands_leave_nothing_at_home(tmp_path, monkeypatch, module, arguments):
    (tmp_path / "home").mkdir()
    monkeypatch.chdir(tmp_path)
    run(f"from {module} import main; main()", tmp_path / "home", *arguments)
    assert list((tmp_path / "home").rglob("*")) == []


@pytest.mark.parametrize("module", ["mcv_runtime", "mcv_runtime.command.cli", "mcv_export.cli", "mcv_export.optimum_command"])
def test_onnxruntime_is_not_imported_before_a_graph_is_opened(tmp_path, module):
    """It reads its switch when it is imported: so a command, and a host after importing us, can still set it."""
    code = (
        f"import os, sys; before = dict(os.environ); import {module}; print('onnxruntime' in sys.modules, before == os.environ)"
    )
    assert run(code, tmp_path) == "False True\n"


def test_a_host_has_a_switch(tmp_path):
    code = (
        "import os, sys, mcv_runtime\n"
        "os.environ['ORT_DISABLE_TELEMETRY'] = '1'\n"
        "print(mcv_runtime.load(threads=1).ask(sys.argv[1], 'What does the text say?').text)\n"
    )
    assert run(code, tmp_path, DEMO) == "HELLO\n"
    assert list(tmp_path.rglob("*")) == []


def test_what_the_user_has_chosen_stays(tmp_path):
    code = (
        "import os\nfrom mcv_runtime.command import terminal\n"
        "os.environ['ORT_DISABLE_TELEMETRY'] = '0'\n"
        "terminal.finish(lambda: print(os.environ['ORT_DISABLE_TELEMETRY'], os.environ['HF_HUB_DISABLE_TELEMETRY']), 'mcv')\n"
    )
    assert run(code, tmp_path) == "0 1\n"
