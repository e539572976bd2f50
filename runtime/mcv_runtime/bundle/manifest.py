"""The contract between the toolchain and the runtime: what `mcv.json` says about a bundle.

The runtime knows no model family. Everything that differs between families is a fact in this file (a number, a
token, a file name) or the *name of a strategy* that the runtime implements (`Slicing`, `Placeholders`, ...).
"""

from __future__ import annotations

import dataclasses
import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

from mcv_runtime.bundle.typed_json import Between, OneOf, parse
from mcv_runtime.errors import BundleCorruptError, shown
from mcv_runtime.files import parse_json

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


Id = Annotated[int, Between(0, 1 << 24)]
Count = Annotated[int, Between(1, 1 << 24)]
"""Of tokens."""
Side = Annotated[int, Between(1, 1 << 14)]
"""Of pictures in pixels, tables in patches; a small number of anything."""
DType = Annotated[str, OneOf({"float32", "float16", "int8", "uint8", "int32", "int64", "bool"})]
_MOST_STATE = 1 << 26
"""Values of a cache's tensor for one token, or of a state in all; published models have 2 ** 20."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorSpec:
    """One input or output of a graph: element type and shape; a string names a dynamic axis."""

    dtype: DType
    shape: tuple[Id | str, ...]

    def __post_init__(self) -> None:
        if len(self.shape) > 8:
            raise BundleCorruptError(f"a tensor has {len(self.shape)} axes; at most 8 are known")


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
    dtype: DType
    shape: tuple[Id | str, ...]

    def __post_init__(self) -> None:
        named, sizes = ([axis for axis in self.shape if isinstance(axis, kind)] for kind in (str, int))
        if self.shape[:1] != ("batch",) or named not in (["batch"], ["batch", "cache_length"]):
            raise BundleCorruptError(f"cache: {shown(self.input)} has other axes than batch, the first, and cache_length")
        if not 0 < math.prod(map(int, sizes)) <= _MOST_STATE:
            raise BundleCorruptError(f"cache: {shown(self.input)} has the shape {shown(list(self.shape))}, as no cache has")

    @property
    def grows(self) -> bool:
        return "cache_length" in self.shape


@dataclass(frozen=True, slots=True, kw_only=True)
class DownsampleSpec:
    """One way to compress a slice: the vision encoder's graph, and the side of the square of patches behind a visual token."""

    graph: GraphName
    merge: Side


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
    scale_resolution: Side = 448
    patch_size: Side = 14
    max_slice_nums: Side = 9
    slice_mode: bool = True
    mean: tuple[float, ...] = (0.5, 0.5, 0.5)
    std: tuple[float, ...] = (0.5, 0.5, 0.5)
    positions: Literal["bucketized", "divided", "strip", "resized"] = "bucketized"
    position_table_side: Annotated[int, Between(1, 1024)] = 70
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
            raise BundleCorruptError(f"downsample_mode={shown(self.downsample_mode)} is none of {', '.join(self.downsample)}")


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
    tokens_per_slice: Side | None = None
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
    vocab_size: Count
    context_length: Annotated[int, Between(1, 1 << 21)]
    part_separator: str = "\n"
    """What stands between pictures and texts of one message."""
    dropped_ids: tuple[Id, ...] = ()
    """Ids that the family removes from an answer before it is decoded."""
    stop_token: Literal["hidden", "decoded"] = "hidden"
    """What becomes of the token that ends an answer: it is left out, or decoded like any other that is not dropped."""
    template_variables: Mapping[str, str] = field(default_factory=dict)
    """What the chat template may name: `bos_token` and the like."""
    positions: Literal["sequential", "canvas"] = "sequential"
    """How tokens are numbered for the decoder: one after the other, or pictures as areas of time, row and column."""
    newline_id: Id | None = None
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
    max_num_frames: Side = 128
    stack_frames: Side | None = None
    max_slice_nums: Side = 1
    sample_fps: Annotated[float, Between(0.001, 1000)] = 3.0
    max_packing: Side = 3


@dataclass(frozen=True, slots=True, kw_only=True)
class GenerationSpec:
    """Generation defaults of the checkpoint."""

    stop_token_ids: tuple[Id, ...]
    repetition_penalty: Annotated[float, Between(0.01, 100)] = 1.0
    max_new_tokens: Count = 512

    def __post_init__(self) -> None:
        if not self.stop_token_ids:
            raise BundleCorruptError("the manifest names no stop token")


@dataclass(frozen=True, slots=True, kw_only=True)
class FileSpec:
    """Size in bytes and sha256 (hex) of one bundle file."""

    size: Annotated[int, Between(0, 1 << 60)]
    sha256: str


@dataclass(frozen=True, slots=True, kw_only=True)
class AdapterSpec:
    """A fine-tune that was merged into the checkpoint: a hub id or a folder's name, how much of it, and its files."""

    name: str
    revision: str | None = None
    weight: float = 1.0
    files: Mapping[str, FileSpec]


Processor = Literal["any", "avx512_vnni", "avx2", "arm64"]


@dataclass(frozen=True, slots=True, kw_only=True)
class NeedsSpec:
    """What answers from the graphs as they are meant: an ONNX Runtime of at least this version, and a kind of processor.

    `avx512_vnni`: sums of full 8-bit products must be exact. `avx2`: the weights have 7 bits, so that they are everywhere.
    `arm64`: both factors are signed, which is right everywhere and fast there. `any`: nothing is multiplied in 8 bits.
    """

    onnxruntime: str = "0"
    processor: Processor = "any"

    def __post_init__(self) -> None:
        if not re.fullmatch(r"\d{1,6}(\.\d{1,6}){0,3}", self.onnxruntime, re.ASCII):
            raise BundleCorruptError(f"needs: onnxruntime is {shown(self.onnxruntime)}, not a version such as 1.31")


@dataclass(frozen=True, slots=True, kw_only=True)
class Manifest:
    """All of `mcv.json`."""

    format: int = FORMAT
    family: str
    """For people and logs; the runtime never branches on it."""
    model: str
    """Where the checkpoint came from: a hub id or a folder's name."""
    revision: str | None = None
    """The hub's commit, as far as it is known."""
    checkpoint: Mapping[str, FileSpec] = field(default_factory=dict)
    """The files it was built from, by name."""
    adapters: tuple[AdapterSpec, ...] = ()
    """In the order in which they were merged."""
    graphs: Mapping[GraphName, GraphSpec]
    cache: tuple[CacheEntry, ...]
    image: ImageSpec
    placeholder: PlaceholderSpec
    text: TextSpec
    generation: GenerationSpec
    hidden_size: Count
    """Width of a visual token and of a text embedding."""
    video: VideoSpec | None = None
    """None: the model, or this toolchain, takes no videos."""
    quantization: Mapping[str, Any] = field(default_factory=dict)
    calibration: tuple[str, ...] = ()
    """The beginnings of the sha256 of pictures that it was calibrated with, which therefore say nothing about what it costs."""
    needs: NeedsSpec = field(default_factory=NeedsSpec)
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
        data = parse_json(text, FILE_NAME, error=BundleCorruptError)
        version = data.get("format") if isinstance(data, dict) else None
        if version != FORMAT:
            raise BundleCorruptError(
                f"{FILE_NAME} has format {shown(version)}, this runtime reads format {FORMAT}; build the bundle again"
            )
        manifest: Manifest = parse(cls, data, FILE_NAME)
        manifest._check_graphs()
        return manifest

    def _check_graphs(self) -> None:
        """Towers say how wide they are, and the cache's tensors are those of the decoder, each once."""
        for name, graph in self.graphs.items():
            if name.startswith("vision_encoder"):
                for tensor, specs in (("pixel_values", graph.inputs), ("vision_hidden", graph.outputs)):
                    if tensor not in specs or not specs[tensor].shape or isinstance(specs[tensor].shape[-1], str):
                        raise BundleCorruptError(f"{FILE_NAME}: {name} has no {tensor} whose last axis is fixed")
        for tensors in ([entry.input for entry in self.cache], [entry.output for entry in self.cache]):
            if len(set(tensors)) < len(tensors):
                raise BundleCorruptError(f"{FILE_NAME}: cache names a tensor twice")
        for name, graph in self.graphs.items():
            for entry in self.cache if name.startswith("decoder") else ():
                for tensor, declared in ((entry.input, graph.inputs), (entry.output, graph.outputs)):
                    if tensor not in declared or declared[tensor].shape != entry.shape:
                        raise BundleCorruptError(f"{FILE_NAME}: {name} has no {shown(tensor)} of the shape that the cache has")
