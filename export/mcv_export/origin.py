"""The checkpoint that a bundle was built from, opened to be compared with it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from mcv_export.adapters import Adapter, open_merged, require_same_adapters
from mcv_export.checkpoint import Checkpoint
from mcv_export.families import recognise
from mcv_export.plan import ModelPlan
from mcv_runtime.bundle.folder import Bundle
from mcv_runtime.errors import CheckpointError


def open_origin(bundle: Bundle, folder: Path, adapters: Sequence[Adapter] = ()) -> tuple[Checkpoint, ModelPlan]:
    """With the adapters that the bundle was built with; raises `CheckpointError` if the bundle is of another model."""
    checkpoint = open_merged(folder, adapters)
    require_same_adapters(bundle, checkpoint)
    family = recognise(checkpoint.config)
    plan = family.plan(checkpoint)
    specs = bundle.manifest.graphs
    if family.name != bundle.manifest.family or any(graph.io.all_inputs != specs[graph.name].inputs for graph in plan.graphs):
        raise CheckpointError(f"{bundle.folder} was built from {bundle.manifest.model}, not from {folder}: their shapes differ")
    return checkpoint, plan
