"""Whether an adapter is of this base, and which of the base's tensors each of its names is."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from mcv_runtime.errors import CheckpointError

_MODEL = re.compile(
    r"(?<![a-z])(?:minicpm[-_ ]?(?:llama3[-_ ]?)?(?P<line>v|o|ocr)|(?P<omni>omnilmm))(?![a-z])"
    r"(?:[-_ ]?v?(?P<major>\d)(?:[._](?P<minor>\d))?(?!\d))?",
    re.IGNORECASE,
)
_OTHERS = re.compile(
    r"(?<![a-z])(qwen|llama|mistral|zephyr|vicuna|gemma|phi-?\d|intern(vl|lm)|llava|deepseek|(chat)?glm|yi-|smol|minicpm[-_]?\d)",
    re.IGNORECASE,
)
"""Models that are often fine-tuned, among them those from which these families' language models were made."""
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


def is_of_another_model(said: str | None, title: str, config: Mapping[str, Any]) -> bool:
    """Whether a base's name or path (`said`) is that of a known model other than the family `title`.

    Where the names and shapes of two models are the same, nothing else tells that an adapter is of the other one. A name that
    is of none, as a user's own folder, says nothing.
    """
    here = _MODEL.search(title)
    if said is None or here is None:
        return False
    claims = [found for found in _MODEL.finditer(said) if found["major"] or _line(found) in ("ocr", "omnilmm")]
    if not claims:
        last = re.split(r"[/\\]", said.rstrip("/\\"))[-1]
        place = said if re.fullmatch(r"[0-9a-f]{8,}", last) else last  # a snapshot in the hub's cache
        return "minicpm" not in re.sub(r"minicpm[-_]?\d", "", place.lower()) and _OTHERS.search(place) is not None
    line, major, minor = _line(claims[-1]), claims[-1]["major"], claims[-1]["minor"]
    versions = set(re.findall(r"\d\.\d", title))
    if re.fullmatch(r"\d(\.\d)?", version := str(config.get("version"))):
        versions = {version if "." in version else f"{version}.0"}
    return line != _line(here) or bool(major and versions and f"{major}.{minor or 0}" not in versions)


def is_of_another_maker(said: str | None) -> bool:
    """Whether a base's name is a hub id that names no model of these families."""
    return said is not None and _HUB_ID.fullmatch(said) is not None and _MODEL.search(said) is None


def renaming(
    wanted: Sequence[tuple[str, ...]], known: Callable[[str], bool], names: Sequence[str], fits: Callable[[int, str], bool]
) -> Callable[[str], str] | None:
    """How an adapter's names become the base's; None if some name is nowhere.

    `wanted` are the adapter's tensors, each with the names that the base may have for it; `fits` says whether one has the
    shape of a name. An adapter that was trained on a part of the model, or on a model around it, has names that begin
    otherwise: then one beginning is found that suits all of those that the base has not.
    Raises `CheckpointError` if there are several.
    """
    strange = [index for index, options in enumerate(wanted) if not any(map(known, options))]
    if not strange:
        return lambda name: name
    for depth in range(3):
        starts = {tuple(option.split(".")[:depth]) for index in strange for option in wanted[index]}
        if len(starts) > 1 or any(len(option.split(".")) <= depth for index in strange for option in wanted[index]):
            return None
        cut = "".join(f"{part}." for part in starts.pop())

        def put(name: str, start: str, cut: str = cut) -> str:
            return start + name.removeprefix(cut)

        tails = [option.removeprefix(cut) for option in wanted[strange[0]]]
        found = {name.removesuffix(tail) for name in names for tail in tails if name.endswith(f".{tail}")}
        found = {
            start
            for start in found | {""}
            if start != cut
            and all(any(known(put(o, start)) and fits(index, put(o, start)) for o in wanted[index]) for index in strange)
        }
        if len(found) > 1:
            raise CheckpointError(f"fits in several places of the base ({', '.join(sorted(found))})")
        if found:
            start = found.pop()
            unknown = {option for index in strange for option in wanted[index]}
            return lambda name: put(name, start) if name in unknown else name
    return None


def _line(found: re.Match[str]) -> str:
    return (found["line"] or found["omni"]).lower()
