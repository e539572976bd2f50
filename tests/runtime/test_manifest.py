"""The manifest: what is written can be read, what is wrong is named."""

import dataclasses
import json

import pytest

from mcv_runtime.bundle.manifest import (
    CacheEntry,
    FileSpec,
    GenerationSpec,
    GraphSpec,
    ImageSpec,
    Manifest,
    PlaceholderSpec,
    TensorSpec,
    TextSpec,
)
from mcv_runtime.errors import BundleCorruptError

ENTRY = CacheEntry(input="p", output="q", dtype="float32", shape=("batch", 2, "cache_length", 64))
CACHE = json.loads(json.dumps(dataclasses.asdict(ENTRY)))
KEYS = TensorSpec(dtype="float32", shape=ENTRY.shape)
MANIFEST = Manifest(
    family="f",
    model="org/name",
    graphs={
        "resampler": GraphSpec(
            file="onnx/r.onnx", precision="fp32", inputs={"x": TensorSpec(dtype="int64", shape=("n", 2))}, outputs={}
        ),
        "vision_encoder": GraphSpec(
            file="onnx/v.onnx",
            precision="fp32",
            inputs={"pixel_values": TensorSpec(dtype="float32", shape=("slices", "patches", 588))},
            outputs={"vision_hidden": TensorSpec(dtype="float32", shape=("slices", "patches", 48))},
        ),
        "decoder_with_past": GraphSpec(
            file="onnx/d.onnx",
            precision="fp32",
            inputs={"input_ids": TensorSpec(dtype="int64", shape=("batch", "sequence")), "p": KEYS},
            outputs={"q": KEYS},
        ),
    },
    cache=(ENTRY,),
    image=ImageSpec(),
    placeholder=PlaceholderSpec(token="<unk>", tokens_per_slice=64),
    text=TextSpec(vocab_size=9, context_length=99, dropped_ids=(0,)),
    generation=GenerationSpec(stop_token_ids=(1, 2)),
    hidden_size=8,
    files={"onnx/r.onnx": FileSpec(size=3, sha256="ab")},
)


def test_round_trip():
    assert Manifest.from_json(MANIFEST.to_json()) == MANIFEST


def changed(**changes):
    data = json.loads(MANIFEST.to_json())
    for path, value in changes.items():
        *parents, last = path.split("__")
        node = data
        for name in parents:
            node = node[name]
        if value is ...:
            del node[last]
        else:
            node[last] = value
    return json.dumps(data)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"format": 2}, "format 2"),
        ({"format": ...}, "format None"),
        ({"hidden_size": ...}, "lacks the key 'hidden_size'"),
        ({"hidden_size": "8"}, "hidden_size must be int"),
        ({"hidden_size": True}, "hidden_size must be int"),
        ({"surprise": 1}, "unknown key 'surprise'"),
        ({"image__slicing": "spiral"}, "this runtime knows 'adaptive_grid'"),
        ({"image__mean": [0.5]}, "three values"),
        ({"image__std": [0.5, 0.0, 0.5]}, "none of 0"),
        ({"image__patch_size": 0}, "patch_size is 0, not from 1"),
        ({"image__patch_size": 900}, "patch_size=900"),
        ({"image__max_slice_nums": 0}, "max_slice_nums is 0, not from 1"),
        ({"image__position_table_side": 10**5}, "position_table_side is 100000, not from 1 to 1,024"),
        ({"text__context_length": 2**40}, "context_length is 1099511627776"),
        ({"text__part_separator": "a" * 1_000_000}, "1,000,000 characters; at most 4,096"),
        ({"generation__repetition_penalty": 10**400}, "repetition_penalty must be float"),
        ({"generation__repetition_penalty": 0.0}, "repetition_penalty is 0.0, not from"),
        ({"placeholder__tokens_per_slice": -1}, "tokens_per_slice is -1, not from 1"),
        ({"graphs__decoder_with_past__inputs__input_ids__dtype": "object"}, "dtype is 'object', not one of bool, float16"),
        ({"graphs__decoder_with_past__inputs__p__shape": ["batch", 2, "cache_length", 32]}, "has no 'p' of the shape"),
        ({"graphs__decoder_with_past__outputs": {}}, "has no 'q' of the shape"),
        ({"graphs__vision_encoder__inputs__pixel_values__shape": []}, "no pixel_values whose last axis is fixed"),
        ({"graphs__vision_encoder__outputs__vision_hidden": ...}, "no vision_hidden whose last axis is fixed"),
        ({"graphs__resampler__inputs__x__shape": ["a"] * 10_000}, "10000 axes"),
        ({"cache": [CACHE, CACHE]}, "names a tensor twice"),
        ({"cache": [CACHE | {"shape": ["batch", 2, "foo", 64]}]}, "other axes than batch"),
        ({"cache": [CACHE | {"shape": [1, 2, "cache_length", 64]}]}, "other axes than batch"),
        ({"cache": [CACHE | {"shape": ["batch", 10**6, "cache_length", 10**6]}]}, "as no cache has"),
        ({"cache": [CACHE | {"shape": ["batch", 0, "cache_length", 64]}]}, "as no cache has"),
        ({"cache": [CACHE | {"dtype": "S1000000"}]}, "dtype is 'S1000000', not one of"),
        ({"files": {"a": {"size": -1, "sha256": ""}}}, "size is -1, not from 0"),
        ({"generation__stop_token_ids": []}, "no stop token"),
        ({"generation__stop_token_ids": 5}, "must be a list"),
        ({"graphs": []}, "graphs must be an object"),
        ({"graphs__other": {}}, "is 'other'"),
        ({"revision": 3.5}, "unusable value"),
    ],
)
def test_what_is_wrong_is_named(changes, reason):
    with pytest.raises(BundleCorruptError, match=reason) as caught:
        Manifest.from_json(changed(**changes))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("text", ["", "{", "[]", "null", "5"])
def test_what_is_no_manifest(text):
    with pytest.raises(BundleCorruptError):
        Manifest.from_json(text)


def test_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        MANIFEST.hidden_size = 9
