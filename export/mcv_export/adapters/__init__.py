"""Fine-tunes: adapters that PEFT saved, merged into a checkpoint's tensors while these are read.

The tensors that come out are those of PEFT's own `merge_and_unload` in float32. May import `checkpoint`, `families` and `hub`.
"""

from collections.abc import Sequence
from pathlib import Path

from mcv_export.adapters.adapter import Adapter, find_adapter
from mcv_export.adapters.merging import merge
from mcv_export.checkpoint import Checkpoint, open_checkpoint
from mcv_runtime.bundle.folder import Bundle
from mcv_runtime.errors import CheckpointError

__all__ = ["Adapter", "find_adapter", "open_merged", "require_same_adapters"]


def open_merged(folder: Path, adapters: Sequence[Adapter] = ()) -> Checkpoint:
    """Open a checkpoint and merge adapters into it, in their order; raises `CheckpointError`."""
    beside = any(adapter.folder.resolve() == folder.resolve() for adapter in adapters)
    return merge(open_checkpoint(folder, adapter_known=beside), adapters)


def require_same_adapters(bundle: Bundle, checkpoint: Checkpoint) -> None:
    """Raise `CheckpointError` where a bundle was built with other adapters than the checkpoint is opened with."""
    built, given = bundle.manifest.adapters, checkpoint.adapters
    if [(spec.weight, spec.files) for spec in built] != [(spec.weight, spec.files) for spec in given]:
        options = " ".join(f"--adapter {spec.name}{'' if spec.weight == 1 else f':{spec.weight:g}'}" for spec in built)
        raise CheckpointError(
            f"{bundle.folder} was built with {options or 'no adapter'}; compare it with the same"
            + ("" if len(built) != len(given) else ", their files and weights are others")
        )
