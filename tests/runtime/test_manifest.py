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

MANIFEST = Manifest(
    family="f",
    model="org/name",
    graphs={
        "resampler": GraphSpec(
            file="onnx/r.onnx", precision="fp32", inputs={"x": TensorSpec(dtype="int64", shape=("n", 2))}, outputs={}
        )
    },
    cache=(CacheEntry(input="p", output="q", dtype="float32", shape=("batch", 2, "cache_length", 64)),),
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
        ({"image__patch_size": 0}, "patch_size=0"),
        ({"image__max_slice_nums": 0}, "below 1"),
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
