"""Finding a checkpoint: a folder on disk, or a repository of the Hugging Face hub. Python files are never fetched."""

from __future__ import annotations

import re
from pathlib import Path

from huggingface_hub import snapshot_download
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from mcv_runtime.errors import CheckpointError
from mcv_runtime.files import at_home

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_PUBLISHED = re.compile(r"(?:MiniCPM|OmniLMM)[\w.-]*", re.IGNORECASE)
_PUBLISHER = "openbmb"
_QUANTIZED = re.compile(r"[-_.](?:int[48]|awq|gptq|gguf|bnb|nf4|mlx|[2-8]-?bit)(?![^-_.])", re.IGNORECASE)
_DESCRIPTION = ["*.json", "*.jinja", "*.txt", "*.model"]


class _NotThereError(CheckpointError):
    """There is no such repository, as far as can be told; another spelling may be there."""


def locate(model: str, *, revision: str | None = None, cache_dir: Path | None = None) -> Path:
    """The local folder of `model`, downloaded first if it is a hub id; HF_HUB_OFFLINE, HF_TOKEN and HF_HOME are honoured.

    A published name may stand without its publisher, and version numbers may be written with dots or underscores.
    """
    folder = at_home(model)
    hub_id = f"{_PUBLISHER}/{model}" if _PUBLISHED.fullmatch(model) else model
    if folder.exists() or not _HUB_ID.fullmatch(hub_id):
        return folder
    _refuse_quantized(hub_id)
    absent = None
    for spelling in spellings(hub_id):
        try:
            return _download(spelling, revision, cache_dir)
        except _NotThereError as error:
            absent = absent or error
    assert absent
    raise absent


def locate_files(
    hub_id: str, patterns: list[str], *, revision: str | None = None, cache_dir: Path | None = None
) -> Path | None:
    """The local folder of some files of a repository, downloaded first; None if `hub_id` cannot be one."""
    return _fetch(hub_id, patterns, revision, cache_dir) if _HUB_ID.fullmatch(hub_id) else None


def spellings(hub_id: str) -> list[str]:
    """The id itself, then the other ways in which its version may be written: 4.6 and 4_6, 2.0 and 2."""
    owner, _, name = hub_id.partition("/")
    names = [name, *(re.sub(r"(?<=\d)[._](?=\d)", separator, name) for separator in "_."), re.sub(r"[._]0$", "", name)]
    return [f"{owner}/{each}" for each in dict.fromkeys(names)]


def _refuse_quantized(hub_id: str) -> None:
    owner, _, name = hub_id.partition("/")
    found = _QUANTIZED.search(name)
    if not found and not owner.lower().startswith("mlx-"):
        return
    base = name[: found.start()] if found else re.sub(r"[-_.](?:bf16|fp16)$", "", name)
    original = f"{_PUBLISHER if _PUBLISHED.fullmatch(base) else owner}/{base}"
    raise CheckpointError(f"{hub_id} is already quantized or converted; build from the full-precision checkpoint, {original}")


def _download(model: str, revision: str | None, cache_dir: Path | None) -> Path:
    found = _fetch(model, [*_DESCRIPTION, "*.safetensors"], revision, cache_dir)
    if not any(found.glob("*.safetensors")):
        found = _fetch(model, [*_DESCRIPTION, "pytorch_model*.bin"], revision, cache_dir)
    return found


def _fetch(model: str, patterns: list[str], revision: str | None, cache_dir: Path | None) -> Path:
    try:
        return Path(snapshot_download(model, revision=revision, cache_dir=cache_dir, allow_patterns=patterns))
    except GatedRepoError:
        reason = "is gated: accept its licence on the hub and set HF_TOKEN"
    except RepositoryNotFoundError:
        raise _NotThereError(
            f"{model} is not on the hub, or is private: check the name, and set HF_TOKEN if it is yours"
        ) from None
    except RevisionNotFoundError:
        reason = f"has no revision {revision}"
    except LocalEntryNotFoundError:
        raise _NotThereError(
            f"{model} is not in the cache and the hub cannot be reached; pass a folder, or try again online"
        ) from None
    except (HfHubHTTPError, OSError, ValueError) as error:
        reason = f"cannot be fetched: {str(error).strip().splitlines()[0]}"
    raise CheckpointError(f"{model} {reason}")
