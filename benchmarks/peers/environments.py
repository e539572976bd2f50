"""Each peer's own environment, pinned, made under the cache folder when it is first needed."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

OWN = "mcv"
"""The environment that runs the race is this project's."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Environment:
    """What `pip install` is told; `source` are packages that are compiled here, for this processor."""

    requirements: tuple[str, ...]
    source: tuple[str, ...] = ()


TORCH = "torch==2.13.0"
ENVIRONMENTS = {
    "llama.cpp": Environment(requirements=("llama-cpp-python==0.3.36", "gguf==0.19.0"), source=("llama-cpp-python",)),
    "openvino": Environment(
        requirements=(
            "openvino==2026.4.1",
            "openvino-genai==2026.4.1.0",
            "openvino-tokenizers==2026.4.1.0",
            "optimum-intel==2.2.0",
            "transformers==5.2.0",  # the only one from which it exports Qwen3.5
            "nncf==3.4.0",
            TORCH,
        )
    ),
    "onnxruntime-genai": Environment(
        requirements=("onnxruntime-genai==0.18.0", "onnxruntime==1.32.0", "onnx-ir==1.1.0", "transformers==5.18.0", TORCH)
    ),
    "torch": Environment(requirements=("transformers==5.24.0", "pillow", TORCH)),
}


class PeerEnvironmentError(RuntimeError):
    """An environment that cannot be made, in one line."""


def python_of(name: str, cache: Path) -> Path:
    """The interpreter of a peer's environment, which is made or brought up to date if it is not as pinned."""
    if name == OWN:
        return Path(sys.executable)
    environment, folder = ENVIRONMENTS[name], cache / name
    python, ready = folder / "bin" / "python", folder / "ready.txt"
    wanted = "\n".join(environment.requirements)
    if ready.exists() and ready.read_text(encoding="utf-8") == wanted:
        return python
    if not python.exists():
        _run([sys.executable, "-m", "venv", str(folder)], name, cache)
    options = [f"--no-binary={package}" for package in environment.source]
    _run([str(python), "-m", "pip", "install", "--quiet", *options, *environment.requirements], name, cache)
    ready.write_text(wanted, encoding="utf-8")
    return python


def _run(command: list[str], name: str, cache: Path) -> None:
    """Compilers work with one job unless the caller says otherwise: their memory grows with the jobs."""
    variables = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    variables = {"CMAKE_BUILD_PARALLEL_LEVEL": "1", "CMAKE_ARGS": "-DGGML_NATIVE=ON"} | variables
    log = cache / f"{name}.log"
    with log.open("wb") as file:
        done = subprocess.run(command, stdout=file, stderr=subprocess.STDOUT, env=variables)
    if done.returncode:
        lines = [line for line in log.read_text(encoding="utf-8", errors="replace").splitlines() if "ERROR" in line]
        raise PeerEnvironmentError(f"{' '.join(command[1:4])} failed: {lines[-1] if lines else 'see'} ({log})")
