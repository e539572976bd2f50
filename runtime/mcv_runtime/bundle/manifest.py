"""The contract between the toolchain and the runtime: what `mcv.json` says about a bundle.

The runtime knows no model family. Everything that differs between families is a fact in this file (a number, a
token, a file name) or the *name of a strategy* that the runtime implements (`Slicing`, `Placeholders`, ...).
"""

from __future__ import annotations

import dataclasses
import json
import types
import typing
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, get_args, get_origin, get_type_hints

from mcv_runtime.errors import BundleCorruptError

FORMAT = 1
FILE_NAME = "mcv.json"

GraphName = Literal[
    "vision_encoder",
    "vision_encoder_16x",
    "vision_encoder_4x",
    "resampler",
    "merger",
    "decoder_with_past",
    "decoder_with_past_kv8",
]


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorSpec:
    """One input or output of a graph: element type and shape; a string names a dynamic axis."""

    dtype: str
    shape: tuple[int | str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class GraphSpec:
    """One ONNX graph of the bundle; paths are relative to the bundle folder, with forward slashes."""

    file: str
    precision: str
    inputs: Mapping[str, TensorSpec]
    outputs: Mapping[str, TensorSpec]


@dataclass(frozen=True, slots=True, kw_only=True)
class CacheEntry:
    """One tensor that a decoder step hands to the next one.

    An entry with the axis `"cache_length"` grows with the sequence (keys, values); one without it is a state of
    fixed size that each step replaces (recurrent, convolution). `"batch"` is the number of sequences.
    """

    input: str
    output: str
    dtype: str
    shape: tuple[int | str, ...]

    @property
    def grows(self) -> bool:
        return "cache_length" in self.shape


@dataclass(frozen=True, slots=True, kw_only=True)
class DownsampleSpec:
    """One way to compress a slice: the vision encoder's graph, and the side of the square of patches behind a visual token."""

    graph: GraphName
    merge: int


SmallImageUpsize = Literal["always", "never", "adaptive"]


@dataclass(frozen=True, slots=True, kw_only=True)
class ImageSpec:
    """How a picture becomes patches.

    `slicing` names the grid search (`adaptive_grid`: a thumbnail plus a grid of equal slices; `aligned_grid`: the same with
    sizes in whole visual tokens; `square`: never cut, one size for all). `downsample` names the modes that a request may choose
    from, `downsample_mode` the default.
    `small_image_upsize`: whether a picture smaller than a slice is enlarged, or only where its text is small (`adaptive`).
    `positions` names how patch positions are numbered (`bucketized`: fractional coordinates, counted up in steps, against a
    table of `position_table_side` entries a side; `divided`: the same, each coordinate a quotient of its own; `strip`: as
    `bucketized` along one row as long as the request's longest slice, to which shorter ones are padded; `resized`: the table is
    resized to the slice, bicubic with antialiasing).
    """

    slicing: Literal["adaptive_grid", "aligned_grid", "square"] = "adaptive_grid"
    scale_resolution: int = 448
    patch_size: int = 14
    max_slice_nums: int = 9
    slice_mode: bool = True
    mean: tuple[float, ...] = (0.5, 0.5, 0.5)
    std: tuple[float, ...] = (0.5, 0.5, 0.5)
    positions: Literal["bucketized", "divided", "strip", "resized"] = "bucketized"
    position_table_side: int = 70
    downsample: Mapping[str, DownsampleSpec] = field(default_factory=dict)
    downsample_mode: str | None = None
    small_image_upsize: SmallImageUpsize = "always"

    def __post_init__(self) -> None:
        if not 1 <= self.patch_size <= self.scale_resolution:
            raise BundleCorruptError(f"patch_size={self.patch_size} is not in 1..scale_resolution={self.scale_resolution}")
        if self.max_slice_nums < 1:
            raise BundleCorruptError(f"max_slice_nums={self.max_slice_nums} is below 1")
        if len(self.mean) != 3 or len(self.std) != 3 or not all(self.std):
            raise BundleCorruptError("image mean and std must have three values each, and std none of 0")
        if self.downsample_mode not in (self.downsample or [None]):
            raise BundleCorruptError(f"downsample_mode={self.downsample_mode!r} is none of {', '.join(self.downsample)}")


@dataclass(frozen=True, slots=True, kw_only=True)
class PlaceholderSpec:
    """The text that stands for a picture in a prompt.

    `strategy` `image_id_slices`: `<image_id>k</image_id><image>..</image>` and, if sliced, one `<slice>..</slice>`
    per slice, the rows of the grid joined by a newline. `bracketed_slices`: no number, every slice written as a picture,
    and all rows together between one `<slice>` and `</slice>`. `token` is repeated `tokens_per_slice` times between a start and
    its end, or as often as the slice's size and the downsample mode make.

    `video_token` stands in a video's frames, each written as a picture without a number; with `video_ids` the video may have
    one.
    """

    strategy: Literal["image_id_slices", "bracketed_slices"] = "image_id_slices"
    token: str
    tokens_per_slice: int | None = None
    image_start: str = "<image>"
    image_end: str = "</image>"
    slice_start: str = "<slice>"
    slice_end: str = "</slice>"
    image_id_start: str = "<image_id>"
    image_id_end: str = "</image_id>"
    use_image_id: bool = True
    video_token: str | None = None
    video_ids: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class TextSpec:
    """How text becomes token ids and back; `context_length` counts prompt and answer together."""

    tokenizer: str = "tokenizer.json"
    chat_template: str = "chat_template.jinja"
    vocab_size: int
    context_length: int
    part_separator: str = "\n"
    """What stands between pictures and texts of one message."""
    dropped_ids: tuple[int, ...] = ()
    """Ids that the family removes from an answer before it is decoded."""
    template_variables: Mapping[str, str] = field(default_factory=dict)
    """What the chat template may name: `bos_token` and the like."""
    positions: Literal["sequential", "canvas"] = "sequential"
    """How tokens are numbered for the decoder: one after the other, or pictures as areas of time, row and column."""
    newline_id: int | None = None
    """The token between two rows of slices, which `canvas` places."""


@dataclass(frozen=True, slots=True, kw_only=True)
class VideoSpec:
    """How a video becomes pictures, unless the request says otherwise.

    `strategy` `frames`: a picture of each second, at most `max_num_frames` in all, and with `stack_frames` above 1 a second one
    of the frames until the next. `strided`: the same, a second being as many frames as there are in one, rounded. `packed`:
    `sample_fps` frames a second, compressed together in packs of `stack_frames` (None: as few as keep the packs below
    `max_num_frames`, and at most `max_packing`).
    """

    strategy: Literal["frames", "strided", "packed"] = "frames"
    max_num_frames: int = 128
    stack_frames: int | None = None
    max_slice_nums: int = 1
    sample_fps: float = 3.0
    max_packing: int = 3


@dataclass(frozen=True, slots=True, kw_only=True)
class GenerationSpec:
    """Generation defaults of the checkpoint."""

    stop_token_ids: tuple[int, ...]
    repetition_penalty: float = 1.0
    max_new_tokens: int = 512

    def __post_init__(self) -> None:
        if not self.stop_token_ids:
            raise BundleCorruptError("the manifest names no stop token")


@dataclass(frozen=True, slots=True, kw_only=True)
class FileSpec:
    """Size in bytes and sha256 (hex) of one bundle file."""

    size: int
    sha256: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Manifest:
    """All of `mcv.json`."""

    format: int = FORMAT
    family: str
    """For people and logs; the runtime never branches on it."""
    model: str
    """Where the checkpoint came from: a hub id or a folder's name."""
    revision: str | None = None
    graphs: Mapping[GraphName, GraphSpec]
    cache: tuple[CacheEntry, ...]
    image: ImageSpec
    placeholder: PlaceholderSpec
    text: TextSpec
    generation: GenerationSpec
    hidden_size: int
    """Width of a visual token and of a text embedding."""
    video: VideoSpec | None = None
    """None: the model, or this toolchain, takes no videos."""
    quantization: Mapping[str, Any] = field(default_factory=dict)
    tools: Mapping[str, str] = field(default_factory=dict)
    files: Mapping[str, FileSpec] = field(default_factory=dict)
    """Every file of the bundle but `mcv.json` itself, by relative path."""

    @property
    def compressor(self) -> GraphName:
        """The graph between tower and decoder."""
        return "merger" if "merger" in self.graphs else "resampler"

    def to_json(self) -> str:
        return json.dumps(dataclasses.asdict(self), indent=2, ensure_ascii=False) + "\n"

    @classmethod
    def from_json(cls, text: str) -> Manifest:
        """Parse `mcv.json`; raises `BundleCorruptError` naming the first key that is missing or wrong."""
        try:
            data = json.loads(text)
        except ValueError as error:
            raise BundleCorruptError(f"{FILE_NAME} is not JSON ({error})") from error
        version = data.get("format") if isinstance(data, dict) else None
        if version != FORMAT:
            raise BundleCorruptError(
                f"{FILE_NAME} has format {version!r}, this runtime reads format {FORMAT}; build the bundle again"
            )
        manifest: Manifest = parse(cls, data, FILE_NAME)
        return manifest


def parse(kind: Any, value: Any, where: str) -> Any:
    """`value` (as `json.loads` gives it) as an instance of the annotated type `kind`; `where` it stands, for the message."""
    if dataclasses.is_dataclass(kind):
        if not isinstance(value, dict):
            raise BundleCorruptError(f"{where} must be an object")
        hints = get_type_hints(kind)
        fields = {f.name: f for f in dataclasses.fields(kind)}
        for name in value.keys() - fields.keys():
            raise BundleCorruptError(f"{where} has the unknown key {name!r}; is the bundle newer than this runtime?")
        for name, f in fields.items():
            if name not in value and f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING:
                raise BundleCorruptError(f"{where} lacks the key {name!r}")
        make: Any = kind
        return make(**{name: parse(hints[name], item, f"{where}: {name}") for name, item in value.items()})
    origin, args = get_origin(kind), get_args(kind)
    if kind is Any:
        return value
    if origin is Literal:
        if value not in args:
            raise BundleCorruptError(f"{where} is {value!r}; this runtime knows {', '.join(map(repr, args))}")
        return value
    if origin in (types.UnionType, typing.Union):
        for option in args:
            if option is type(None) and value is None:
                return None
            if option in (int, str) and type(value) is option:
                return value
            if dataclasses.is_dataclass(option) and isinstance(value, dict):
                return parse(option, value, where)
        raise BundleCorruptError(f"{where} has the unusable value {value!r}")
    if origin is tuple:
        if not isinstance(value, list):
            raise BundleCorruptError(f"{where} must be a list")
        return tuple(parse(args[0], item, f"{where}[{i}]") for i, item in enumerate(value))
    if origin is not None and issubclass(origin, Mapping):
        if not isinstance(value, dict):
            raise BundleCorruptError(f"{where} must be an object")
        return {parse(args[0], key, where): parse(args[1], item, f"{where}: {key}") for key, item in value.items()}
    if kind is float and type(value) is int:
        return float(value)
    if type(value) is not kind:
        raise BundleCorruptError(f"{where} must be {kind.__name__}, not {value!r}")
    return value
