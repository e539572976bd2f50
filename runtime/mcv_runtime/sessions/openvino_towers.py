"""OpenVINO for the graphs that encode pictures; the decoder, whose cache is bound where it lies, stays with ONNX Runtime.

Needs the package `openvino` (`pip install "minicpmv-onnx[openvino]"`), which runs on processors of any vendor, and reads what
bundles hold in every precision: floats as they are, 4- and 8-bit weights, 8-bit activations with ranges of any kind.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from mcv_runtime.errors import OptionError
from mcv_runtime.sessions.graphs import Session, SessionFactory

if TYPE_CHECKING:
    import onnxruntime as ort

Precision = Literal["f32", "bf16"]
TOWERS: dict[str, Precision] = {"openvino": "f32", "openvino-bf16": "bf16"}
"""Names of the provider, and in what floats it computes."""


class OpenVinoSession:
    """A graph that OpenVINO has compiled; threads may share it."""

    def __init__(self, compiled: Any) -> None:
        self._compiled = compiled

    def run(self, output_names: list[str] | None, input_feed: dict[str, Any]) -> list[Any]:
        results = self._compiled.create_infer_request().infer(input_feed)  # one request is for one thread at a time
        wanted = [output.any_name for output in self._compiled.outputs] if output_names is None else output_names
        return [np.array(results[name]) for name in wanted]

    def io_binding(self) -> Any:
        raise NotImplementedError("only the decoder's tensors are bound, and OpenVINO does not run it")

    def run_with_iobinding(self, iobinding: Any) -> None:
        raise NotImplementedError("only the decoder's tensors are bound, and OpenVINO does not run it")


def openvino_session(provider: str) -> SessionFactory:
    """The session factory of a provider in `TOWERS`.

    Raises `OptionError` if the package is not there or the processor has no such floats, and when a session is opened on a
    graph with operators that OpenVINO does not know.
    """
    try:
        import openvino
    except ImportError as error:
        raise OptionError(
            f"provider={provider!r} needs the package openvino; run `pip install 'minicpmv-onnx[openvino]'`"
        ) from error
    core, floats = openvino.Core(), TOWERS[provider]
    if floats == "bf16" and "BF16" not in core.get_property("CPU", "OPTIMIZATION_CAPABILITIES"):
        raise OptionError(f"provider={provider!r}, and this processor does not compute in bf16; provider='openvino' works")

    def open_there(path: Path, options: ort.SessionOptions) -> Session:
        settings = {
            "PERFORMANCE_HINT": "LATENCY",
            "INFERENCE_PRECISION_HINT": floats,
            "INFERENCE_NUM_THREADS": options.intra_op_num_threads,  # 0: it decides, as for ONNX Runtime
        }
        try:
            return OpenVinoSession(core.compile_model(path, "CPU", settings))
        except RuntimeError as error:
            if not path.is_file():
                raise
            raise OptionError(f"OpenVINO does not run {path.name}: {_reason(error)}; leave provider out") from error

    return open_there


def _reason(error: RuntimeError) -> str:
    """The last line that says something: OpenVINO's own traces come first."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1][:300] if lines else type(error).__name__
