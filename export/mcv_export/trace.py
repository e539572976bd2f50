"""Tracing a graph's module into ONNX without any weight: only shapes exist, so a 7B model traces in kilobytes."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import cache
from typing import Any
from unittest.mock import patch

import onnx_ir as ir
import torch
from onnx_ir.passes.common import ClearMetadataAndDocStringPass
from onnxscript import optimizer, rewriter
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.onnx._internal.exporter._registration import ONNXRegistry

from mcv_export.plan import GraphPlan
from mcv_export.storage import IN_FLOAT, Storage
from mcv_graphs import ops
from mcv_graphs.contract import GraphIO
from mcv_runtime.bundle.manifest import TensorSpec


def trace(plan: GraphPlan, storage: Storage = IN_FLOAT) -> tuple[ir.Model, nn.Module]:
    """The optimized graph, its initializers named as the module's parameters but without values, and the (fake) module."""
    io = plan.io
    sizes = _example_sizes(io)
    with FakeTensorMode(), ops.emitting(), torch.no_grad(), _quiet(), _operators_once():
        module = storage.module(plan)
        examples: list[Any] = [_example(spec, sizes) for spec in io.inputs.values()]
        shapes: list[Any] = [_dynamic(spec) for spec in io.inputs.values()]
        if io.cache:
            cache = [TensorSpec(dtype=entry.dtype, shape=entry.shape) for entry in io.cache]
            examples.append([_example(spec, sizes) for spec in cache])
            shapes.append([_dynamic(spec) for spec in cache])
        program = torch.export.export(module, tuple(examples), dynamic_shapes=tuple(shapes), strict=False)
        model = _translated(program, io)
        weights = {name for name, _ in [*module.named_parameters(), *module.named_buffers()]}
        for name, value in model.graph.initializers.items():
            if name in weights:
                value.const_value = None  # a value would be folded, and small weights would vanish into others
        with _without_slices_split():
            optimizer.optimize_ir(model)
    _drop_unused_outputs(model)
    _name_axes(model, io)
    ClearMetadataAndDocStringPass()(model)  # the tracer's call stacks: this machine's paths, and two thirds of the file
    model.producer_name, model.producer_version = "mcv", None
    return model, module


def _translated(program: torch.export.ExportedProgram, io: GraphIO) -> ir.Model:
    """The program in ONNX.

    The exporter first takes apart what ONNX has no operator for, by tracing all of it once more: 60 % of the time that a tower
    took. Of our modules hardly any needs that: it is done where the translation fails without it.
    """
    decompose = program.run_decompositions
    for attempt in (lambda table: program, decompose):
        program.run_decompositions = attempt
        try:
            traced = torch.onnx.export(
                program,
                dynamo=True,
                optimize=False,
                verbose=False,
                input_names=list(io.all_inputs),
                output_names=list(io.all_outputs),
            )
        except torch.onnx.OnnxExporterError:
            if attempt is decompose:
                raise
        else:
            assert traced is not None
            return traced.model
    raise AssertionError


def _example_sizes(io: GraphIO) -> dict[str, int]:
    """A different size for each dynamic axis: equal ones would be traced as one axis, and 0 and 1 as constants."""
    axes = [axis for spec in io.all_inputs.values() for axis in spec.shape if isinstance(axis, str)]
    return {axis: 2 + index for index, axis in enumerate(dict.fromkeys(axes))}


def _example(spec: TensorSpec, sizes: dict[str, int]) -> torch.Tensor:
    shape = [sizes[axis] if isinstance(axis, str) else axis for axis in spec.shape]
    return torch.zeros(shape, dtype=getattr(torch, spec.dtype))


def _dynamic(spec: TensorSpec) -> dict[int, Any]:
    return {index: torch.export.Dim.DYNAMIC for index, axis in enumerate(spec.shape) if isinstance(axis, str)}


def _drop_unused_outputs(model: ir.Model) -> None:
    """Leave out the optional outputs that nothing reads; ONNX Runtime would otherwise allocate them."""
    kept = set(model.graph.outputs)
    for node in model.graph:
        for output in node.outputs:
            if output not in kept and not output.uses():
                output.name = ""


def _name_axes(model: ir.Model, io: GraphIO) -> None:
    """Give the dynamic axes the contract's names in place of the tracer's."""
    names: dict[str, str] = {}
    for value, spec in zip(model.graph.inputs, io.all_inputs.values(), strict=True):
        assert value.shape is not None
        for traced, axis in zip(value.shape, spec.shape, strict=True):
            if isinstance(axis, str):
                names[str(traced)] = axis
        value.shape = ir.Shape(spec.shape)
    for value, spec in zip(model.graph.outputs, io.all_outputs.values(), strict=True):
        value.shape = ir.Shape(spec.shape)
    for node in model.graph:
        for output in node.outputs:
            if output.shape is not None and output not in model.graph.outputs:
                output.shape = ir.Shape(
                    [names.get(str(axis)) if isinstance(axis, ir.SymbolicDim) else axis for axis in output.shape]
                )


_operators = cache(ONNXRegistry.from_torchlib)


def _operators_once() -> AbstractContextManager[object]:
    """The exporter reads the sources of its 2,000 operators anew for every graph: much of the time of a small one."""
    return patch.object(ONNXRegistry, "from_torchlib", staticmethod(_operators))


def _without_slices_split() -> AbstractContextManager[object]:
    """The one rule whose pattern has two ends looks through the whole graph at every node, for what our modules never make.

    With it a full-size int8-token tower took 107 seconds to trace, without it 43; the graphs are the same.
    """
    rules = tuple(rule for rule in getattr(rewriter, "_DEFAULT_REWRITE_RULES", ()) if rule.name != "SlicesSplit")
    return patch.object(rewriter, "_DEFAULT_REWRITE_RULES", rules, create=True)


@contextmanager
def _quiet() -> Iterator[None]:
    """The exporters warn of what we do on purpose (no values, no torchvision); keep that from the user, for this block only."""
    loggers = [
        logging.getLogger(name)
        for name in ("torch.onnx", "torch.onnx._internal.exporter._registration", "onnx_ir", "onnxscript")
    ]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
