"""A checkpoint's own engine: the runtime's preprocessing and prompts, with torch in the place of ONNX Runtime."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
import torch
from numpy.typing import NDArray
from torch import nn

from mcv_calibration.continuation import continuation_feed
from mcv_export.checkpoint import Checkpoint
from mcv_export.eager import eager_module
from mcv_export.file_specs import folder_specs
from mcv_export.plan import ModelPlan
from mcv_export.remembering import RememberingSession
from mcv_export.texts import copy_texts
from mcv_graphs.contract import GraphIO
from mcv_runtime.bundle.manifest import FILE_NAME, GraphName, GraphSpec, Manifest
from mcv_runtime.engine import Engine, load
from mcv_runtime.errors import OptionError
from mcv_runtime.sessions.graphs import Session
from mcv_runtime.text.prompts import Prompt


class TorchSession:
    """A session over a module, which is made when it is first needed.

    It runs whole sequences: a cache that is given must be as long as what it holds. There is no io binding, so such an engine
    encodes pictures and scores texts, but does not write answers.
    """

    def __init__(self, module: Callable[[], nn.Module], io: GraphIO) -> None:
        self._make, self._io = module, io
        self._module: nn.Module | None = None

    @property
    def module(self) -> nn.Module:
        if self._module is None:
            self._module = self._make()
        return self._module

    def run(self, output_names: list[str] | None, input_feed: dict[str, Any]) -> Any:
        """As `onnxruntime.InferenceSession.run`."""
        # torch warns of what it might write to, such as a picture's kept embeddings
        given = {name: torch.from_numpy(np.require(value, requirements="W")) for name, value in input_feed.items()}
        arguments: list[Any] = [given[name] for name in self._io.inputs]
        if self._io.cache:
            arguments.append([given[entry.input] for entry in self._io.cache])
        with torch.inference_mode():
            result = self.module(*arguments)
        first, cache = result if self._io.cache else (result, [])
        outputs = dict(zip(self._io.all_outputs, (tensor.numpy() for tensor in (first, *cache)), strict=True))
        return [outputs[name] for name in output_names or outputs]

    def io_binding(self) -> Any:
        raise OptionError("torch scores whole sequences here; build a bundle to write answers")

    def run_with_iobinding(self, iobinding: Any) -> None:
        self.io_binding()


def prompt_feed(
    manifest: Manifest, prompt: Prompt, embeds: Sequence[NDArray[np.float32]], logit_positions: NDArray[np.int64]
) -> dict[str, NDArray[Any]]:
    """What a decoder is given to read a prompt at once; `embeds` are its pictures' visual tokens, each [tokens, hidden]."""
    visual = np.concatenate([np.empty((0, manifest.hidden_size), np.float32), *embeds])
    return {**continuation_feed(manifest, prompt, visual, [0]), "logit_positions": logit_positions}


def oracle_engine(
    plan: ModelPlan,
    checkpoint: Checkpoint,
    modules: Mapping[GraphName, nn.Module] | None = None,
    reference: dict[GraphName, Session] | None = None,
) -> Engine:
    """An engine whose graphs are the plan's modules in float, or the given ones in their place.

    `reference`: the sessions of those in float, for other engines of the model to use again: what they have computed once, they
    remember.
    """
    given, floats = modules or {}, {} if reference is None else reference
    sessions: dict[str, Session] = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        specs: dict[GraphName, GraphSpec] = {}
        for graph in plan.graphs:
            if graph.name in given:
                sessions[graph.name] = TorchSession(partial(given.__getitem__, graph.name), graph.io)
            else:
                in_float = TorchSession(partial(eager_module, graph, checkpoint), graph.io)
                sessions[graph.name] = floats.setdefault(graph.name, RememberingSession(in_float))
            specs[graph.name] = GraphSpec(
                file=graph.name, precision="fp32", inputs=graph.io.all_inputs, outputs=graph.io.all_outputs
            )
            (folder / graph.name).touch()
        copy_texts(checkpoint, folder, plan.chat_template)
        manifest = plan.manifest(family="", model=checkpoint.folder.name, graphs=specs, files=folder_specs(folder))
        (folder / FILE_NAME).write_text(manifest.to_json(), encoding="utf-8")

        def open_module(path: Path, options: ort.SessionOptions) -> Session:
            return sessions[path.name]

        # whoever watches the modules wants to see them at work every time
        return load(folder, session_factory=open_module, reuse=False, batch_slices=1)
