"""Graphs that are traced once a process, however many tests build them: tracing is nine tenths of what a small build takes.

What is remembered is told apart by all that the traced module is made of; what cannot be told is traced each time.
"""

import dataclasses
from collections.abc import Iterator
from contextlib import contextmanager
from types import FunctionType
from typing import Any
from unittest.mock import patch

import onnx_ir as ir
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

import mcv_export.graph_files
from mcv_export.plan import GraphPlan
from mcv_export.storage import Storage
from mcv_export.trace import trace


class _UnknownError(Exception):
    """Something whose value nobody can tell."""


def told(value: Any) -> object:
    """All that a module, or a part of one, is made of, but the values of tensors: a fake one has none."""
    if value is None or isinstance(value, bool | int | float | str | bytes | torch.dtype | torch.device | type):
        return type(value), value
    if isinstance(value, torch.Tensor):
        return type(value), tuple(value.shape), value.dtype, value.requires_grad
    if isinstance(value, nn.Module):
        return type(value), told(vars(value))
    if isinstance(value, dict):
        return type(value), tuple((told(key), told(one)) for key, one in value.items())
    if isinstance(value, tuple | list):
        return type(value), tuple(map(told, value))
    if isinstance(value, set | frozenset):
        return type(value), frozenset(map(told, value))
    if dataclasses.is_dataclass(value):
        return type(value), tuple(told(getattr(value, one.name)) for one in dataclasses.fields(value))
    if isinstance(value, FunctionType) and not value.__closure__ and not value.__defaults__:
        return value
    raise _UnknownError(type(value))


@contextmanager
def traced_once() -> Iterator[None]:
    """Builds within trace what is new to them."""
    known: dict[object, ir.Model] = {}

    def remembering(plan: GraphPlan, storage: Storage) -> tuple[ir.Model, nn.Module]:
        with FakeTensorMode(), torch.no_grad():
            module = storage.module(plan)
        try:
            key = told(module), told(plan.io)
        except _UnknownError:
            return trace(plan, storage)
        if key not in known:
            model, module = trace(plan, storage)
            known[key] = model.clone()
            return model, module
        return known[key].clone(), module

    with patch.object(mcv_export.graph_files, "trace", remembering):
        yield
