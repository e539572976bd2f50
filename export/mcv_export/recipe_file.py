"""The file behind `mcv-export build --recipe`: what most builds leave as it is, and the command line has no options for."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from mcv_calibration.recipe import require_known
from mcv_export.precision import DEFAULT, EVERY, ROLES
from mcv_runtime.errors import OptionError, shown
from mcv_runtime.files import parse_json, read_text

_KINDS: dict[str, tuple[type, ...]] = {
    "target": (str,),
    "graphs": (dict,),
    "num_samples": (int,),
    "min_agreement": (int, float),
    "search": (bool,),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class RecipeFile:
    """A JSON object with these keys, each of which may be left out; a bundle's `mcv.json` holds one under `quantization`."""

    target: str | None = None
    graphs: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    """Settings of `GraphRecipe` by graph, or by `*`."""
    num_samples: int | None = None
    """How many pictures and questions are used at most, to calibrate and to measure."""
    min_agreement: float | None = None
    """The build fails below this share of next tokens that are fp32's, 0 to 1."""
    search: bool = False
    """Keep the blocks that cost most at a higher precision until the limits are met."""

    @classmethod
    def read(cls, file: Path) -> RecipeFile:
        """Raises `OptionError` for a file that cannot be read and for what nobody would heed in it."""
        data = parse_json(read_text(file, error=OptionError), str(file), error=OptionError)
        if isinstance(data, dict) and isinstance(data.get("quantization"), dict):
            data = data["quantization"]
        if not isinstance(data, dict):
            raise OptionError(f"{file} is no object with settings such as `graphs`")
        require_known(data, [each.name for each in fields(cls)], str(file))
        for name, kinds in _KINDS.items():
            if name in data and type(data[name]) not in kinds:
                raise OptionError(f"{file} has {name}={shown(data[name])}")
        graphs = data.get("graphs", {})
        require_known(graphs, [EVERY, *DEFAULT, *ROLES], f"{file}: graphs")
        for name, settings in graphs.items():
            if not isinstance(settings, dict):
                raise OptionError(f"{file}: {name} must be an object with settings such as `precision`")
        return cls(**data)
