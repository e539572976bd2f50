"""Choose what does the computing, by a short name: a provider of ONNX Runtime, or OpenVINO for the towers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mcv_runtime.errors import OptionError
from mcv_runtime.sessions.graphs import Session, SessionFactory, cpu_session
from mcv_runtime.sessions.openvino_towers import TOWERS, openvino_session

_SUFFIX = "ExecutionProvider"
CPU = "cpu"
_DEVICES = {"cuda": "cuda", "tensorrt": "cuda", "rocm": "cuda", "migraphx": "cuda", "dml": "dml", "cann": "cann"}


def tower_session(provider: str = CPU) -> SessionFactory:
    """The session factory of a provider for graphs that encode pictures; raises like `provider_session`."""
    wanted = provider.strip().lower()
    return openvino_session(wanted) if wanted in TOWERS else provider_session(provider)


def provider_session(provider: str = CPU) -> SessionFactory:
    """The session factory of a provider, `cpu`, `cuda` and so on, for the decoder; what it cannot do, the CPU does.

    Raises `OptionError` if the installed ONNX Runtime has no such provider, or when a session is opened and it does not start.
    """
    import onnxruntime as ort

    wanted = provider.strip().lower()
    if wanted in TOWERS:
        return cpu_session
    installed = {_short(name): name for name in ort.get_available_providers()}
    if wanted not in installed:
        known = {_short(name) for name in ort.get_all_providers()} | installed.keys()
        reason = "which the installed onnxruntime does not have" if wanted in known else "which ONNX Runtime does not know"
        raise OptionError(f"provider={provider!r}, {reason}; it has {', '.join(sorted(installed))}")
    if wanted == CPU:
        return cpu_session
    name = installed[wanted]

    def open_there(path: Path, options: ort.SessionOptions) -> Session:
        session: Any = ort.InferenceSession(path, options, providers=[name, f"CPU{_SUFFIX}"])
        if name not in session.get_providers():  # ONNX Runtime only logs it, and goes on with the CPU
            raise OptionError(f"provider={provider!r} does not start here; are its libraries installed? provider='cpu' works")
        opened: Session = session
        return opened

    return open_there


def device_of(provider: str) -> str | None:
    """The device on which a provider's graphs keep their tensors, as ONNX Runtime calls it; None: in the machine's memory."""
    return _DEVICES.get(provider.strip().lower())


def _short(name: str) -> str:
    return name.removesuffix(_SUFFIX).lower()
