"""A checkpoint folder that a test may damage."""

import importlib.util
import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from mcv_export import cli

Edit = Callable[[dict[str, torch.Tensor]], None]


@pytest.fixture(scope="session", autouse=True)
def _traced_once(traced_once: None) -> None:
    """All that is built here."""


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    """`mcv-export` with these arguments, in this process: its exit code, and what it printed to stdout and stderr."""

    def run(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["mcv-export", *map(str, arguments)])
        with pytest.raises(SystemExit) as exit_info:
            cli.main()
        printed = capsys.readouterr()
        return int(exit_info.value.code or 0), printed.out, printed.err

    return run


@pytest.fixture
def copied(golden_root: Path, tmp_path: Path) -> Callable[[str], Path]:
    """Copies a family's golden checkpoint."""

    def copy(family: str) -> Path:
        folder = tmp_path / "checkpoint"
        shutil.copytree(golden_root / family / "checkpoint", folder, copy_function=shutil.copyfile)
        folder.chmod(0o755)
        return folder

    return copy


@pytest.fixture
def checkpoint(copied: Callable[[str], Path]) -> Path:
    """A copy of the 2.6 golden checkpoint."""
    return copied("minicpmv2_6")


@pytest.fixture
def copy_checkpoint(golden_root: Path, tmp_path: Path) -> Callable[..., Path]:
    """A copy of a family's golden checkpoint with one of its JSON files changed, or made."""

    def copy(family: str, change: Callable[[dict[str, Any]], Any], file: str = "config.json") -> Path:
        folder = tmp_path / f"changed-{family}" / "checkpoint"
        if not folder.exists():
            shutil.copytree(golden_root / family / "checkpoint", folder, copy_function=shutil.copyfile)
            folder.chmod(0o755)
        path = folder / file
        content = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
        change(content)
        path.write_text(json.dumps(content), encoding="utf-8")
        return folder

    return copy


@pytest.fixture
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., tuple[object, ...]]:
    """Arguments of `mcv-export build` that name a recipe file with these keys."""

    def write(**keys: Any) -> tuple[object, ...]:
        file = tmp_path_factory.mktemp("recipe") / "recipe.json"
        file.write_text(json.dumps(keys), encoding="utf-8")
        return "--recipe", file

    return write


@pytest.fixture
def edit_tensors(checkpoint: Path) -> Callable[[Edit], Path]:
    """Change the copy's tensors in place."""

    def edit(change: Edit) -> Path:
        tensors = load_file(checkpoint / "model.safetensors")
        change(tensors)
        save_file({name: value.contiguous() for name, value in tensors.items()}, checkpoint / "model.safetensors")
        return checkpoint

    return edit


@pytest.fixture
def edit_config(checkpoint: Path) -> Callable[[Callable[[dict[str, Any]], Any]], Path]:
    """Change the copy's config.json in place."""

    def edit(change: Callable[[dict[str, Any]], Any]) -> Path:
        path = checkpoint / "config.json"
        config = json.loads(path.read_text())
        change(config)
        path.write_text(json.dumps(config))
        return checkpoint

    return edit


@pytest.fixture(scope="session")
def peft_reference() -> Any:
    """The module of that name: PEFT's own merge."""
    spec = importlib.util.spec_from_file_location("peft_reference", Path(__file__).parent / "peft_reference.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
