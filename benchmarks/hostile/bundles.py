"""Bundles whose manifest, graphs or tokenizer were changed; sizes and hashes fit again, as a stranger's would."""

from __future__ import annotations

import hashlib
import json
import math
import shutil
from pathlib import Path
from random import Random
from typing import Any

import onnx

from hostile.changed_json import changed
from hostile.guarded import Case, Draw
from mcv_runtime import load
from mcv_runtime.bundle.folder import DEFAULT

PICTURE = Path(__file__).parents[2] / "models" / "tiny" / "demo.png"
_SIZES = [-1, 0, 1, 7, 65_536, 2**31 - 1, 2**31, 2**40, 2**62, -(2**63)]
_OPERATORS = "GroupQueryAttention MatMulNBits Loop If Scan Reshape Gather ScatterND Expand ConstantOfShape Tile Resize Pad"
_EXTERNAL = ["-5", "x", "1e9", "9" * 21, "../mcv.json", "/etc/passwd", "vision_encoder_q8.onnx.data", "\0", *map(str, _SIZES)]
_REGEX = ["(a+)+$", "(?=(a|aa)+$)", "[", r"\p{L}{0,100000}", "(.*.*)*x", "", "(?:)", "a{1000000}", ".", r"\s+(?!\S)"]


def manifests(scratch: Path) -> Draw:
    """`mcv.json` with one odd value."""
    bundle = shutil.copytree(DEFAULT, scratch / "bundle")
    manifest = json.loads((bundle / "mcv.json").read_bytes())

    def draw(dice: Random) -> Case:
        what, text = changed(manifest, dice, lambda path: path[0] != "graphs" or dice.random() < 0.2)
        (bundle / "mcv.json").write_bytes(text)
        return Case(what, lambda: _ask(bundle))

    return draw


def graphs(scratch: Path) -> Draw:
    """ONNX files with changed bytes, shapes, attributes, operators, wiring or places of their weights."""
    bundle = shutil.copytree(DEFAULT, scratch / "bundle")
    originals = {path: path.read_bytes() for path in sorted((bundle / "onnx").glob("*.onnx"))}

    def draw(dice: Random) -> Case:
        for path, data in originals.items():
            path.write_bytes(data)
        path = dice.choice(list(originals))
        what, data = _bytes(originals[path], dice) if dice.random() < 0.3 else _graph(originals[path], dice)
        path.write_bytes(data)
        _make_fit(bundle)
        return Case(f"{path.name}: {what}", lambda: _ask(bundle))

    return draw


def tokenizers(scratch: Path) -> Draw:
    """`tokenizer.json` with an odd value, or with rules that take long or make texts long."""
    bundle = shutil.copytree(DEFAULT, scratch / "bundle")
    original = json.loads((bundle / "tokenizer.json").read_bytes())

    def draw(dice: Random) -> Case:
        if dice.random() < 0.4:
            what, text = changed(original, dice, lambda path: path[:2] != ("model", "merges") and len(path) < 5)
        else:
            made = json.loads(json.dumps(original))
            what = _rules(made, dice)
            text = json.dumps(made).encode()
        (bundle / "tokenizer.json").write_bytes(text)
        _make_fit(bundle)
        return Case(what, lambda: _ask(bundle, "What does the text say? " + "a" * 40 + "!  \n"))

    return draw


def _ask(bundle: Path, question: str = "What does the text say?") -> str:
    with load(bundle, threads=1) as engine:
        return engine.ask(PICTURE, question, max_new_tokens=3).text


def _make_fit(bundle: Path) -> None:
    path = bundle / "mcv.json"
    manifest = json.loads(path.read_bytes())
    for name in manifest["files"]:
        data = (bundle / name).read_bytes()
        manifest["files"][name] = {"size": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    path.write_text(json.dumps(manifest), encoding="utf-8")


def _bytes(data: bytes, dice: Random) -> tuple[str, bytes]:
    made = bytearray(data)
    count = dice.choice((1, 2, 4, 16))
    for _ in range(count):
        made[dice.randrange(len(made))] = dice.choice((0, 255, dice.randrange(256)))
    return f"{count} bytes", bytes(made[: dice.randrange(len(made))] if dice.random() < 0.2 else made)


def _graph(data: bytes, dice: Random) -> tuple[str, bytes]:
    model = onnx.ModelProto()
    model.ParseFromString(data)
    done = [dice.choice(_CHANGES)(model, dice) for _ in range(dice.choice((1, 1, 2, 3)))]
    return ", ".join(done), model.SerializeToString()


def _change_shape(model: Any, dice: Random) -> str:
    weight = dice.choice(model.graph.initializer)
    if weight.dims:
        weight.dims[dice.randrange(len(weight.dims))] = dice.choice(_SIZES)
    return f"shape of {weight.name}"


def _change_type(model: Any, dice: Random) -> str:
    weight = dice.choice(model.graph.initializer)
    weight.data_type = dice.choice((0, 1, 2, 3, 6, 7, 8, 9, 10, 11, 16, 17, 21, 22, 99))
    return f"type of {weight.name}"


def _change_place(model: Any, dice: Random) -> str:
    placed = [weight for weight in model.graph.initializer if weight.external_data]
    if placed:
        dice.choice(dice.choice(placed).external_data).value = dice.choice(_EXTERNAL)
    return "place of a weight"


def _change_attribute(model: Any, dice: Random) -> str:
    node = dice.choice([node for node in model.graph.node if node.attribute])
    attribute = dice.choice(node.attribute)
    if attribute.type == onnx.AttributeProto.INT:
        attribute.i = dice.choice(_SIZES)
    elif attribute.type == onnx.AttributeProto.FLOAT:
        attribute.f = dice.choice((math.nan, 1e38, -1.0, 0.0))
    elif attribute.ints:
        attribute.ints[dice.randrange(len(attribute.ints))] = dice.choice(_SIZES)
    return f"{attribute.name} of {node.op_type}"


def _change_operator(model: Any, dice: Random) -> str:
    node = dice.choice(model.graph.node)
    node.op_type, node.domain = dice.choice([*_OPERATORS.split(), "Nothing"]), dice.choice(("", "com.microsoft", "another"))
    return f"{node.op_type} of {node.domain}"


def _change_wiring(model: Any, dice: Random) -> str:
    node = dice.choice([node for node in model.graph.node if node.input])
    names = [dice.choice(model.graph.initializer).name, "", dice.choice(model.graph.input).name, "nothing"]
    node.input[dice.randrange(len(node.input))] = dice.choice(names)
    return f"an input of {node.op_type}"


def _drop_node(model: Any, dice: Random) -> str:
    node = dice.choice(model.graph.node)
    model.graph.node.remove(node)
    return f"no {node.op_type}"


def _change_port(model: Any, dice: Random) -> str:
    ports = [port for port in [*model.graph.input, *model.graph.output] if port.type.tensor_type.shape.dim]
    port = dice.choice(ports)
    dice.choice(port.type.tensor_type.shape.dim).dim_value = dice.choice(_SIZES)
    return f"axes of {port.name}"


def _change_version(model: Any, dice: Random) -> str:
    dice.choice(model.opset_import).version = dice.choice((0, -1, 1, 7, 99, 2**40))
    return "versions"


_CHANGES = [_change_shape, _change_type, _change_place, _change_attribute, _change_operator, _change_wiring, _drop_node]
_CHANGES += [_change_port, _change_version]


def _rules(made: dict[str, Any], dice: Random) -> str:
    """Change a tokenizer's own rules in place."""
    regex = {"Regex": dice.choice(_REGEX)}
    grown = {"type": "Replace", "pattern": {"String": dice.choice(("", "a"))}, "content": "a" * 10}
    part = dice.choice(("added", "split", "normalizer", "decoder", "processor", "ids", "many"))
    if part == "added":
        token = dice.choice(made["added_tokens"])
        token[dice.choice(list(token))] = dice.choice((None, -1, 2**40, "", True, [], {}, "\0", "a" * 100_000, 1.5, "<x>"))
    elif part == "split":
        one = {"type": "Split", "pattern": regex, "behavior": "Isolated", "invert": dice.random() < 0.5}
        made["pre_tokenizer"] = dice.choice((one, {"type": "Sequence", "pretokenizers": [one] * dice.choice((1, 50))}))
    elif part == "normalizer":
        odd = [{"type": "Replace", "pattern": regex, "content": "b" * dice.choice((0, 1, 1000))}, {"type": "Nothing"}]
        odd += [{"type": "Prepend", "prepend": "x" * 100_000}, {"type": "Precompiled", "precompiled_charsmap": "AAAA"}]
        odd += [{"type": "Sequence", "normalizers": [grown] * dice.choice((1, 2, 5, 12))}, {"type": "NFKD"}]
        made["normalizer"] = dice.choice(odd)
    elif part == "decoder":
        odd = [{"type": "Replace", "pattern": regex, "content": "b" * dice.choice((0, 1, 10_000))}, {"type": "Fuse"}, None]
        odd += [
            {"type": "Strip", "content": "a", "start": 2**40, "stop": 2**40},
            {"type": "WordPiece", "prefix": "", "cleanup": True},
        ]
        odd += [{"type": "CTC", "pad_token": "", "word_delimiter_token": "", "cleanup": True}]
        odd += [{"type": "Sequence", "decoders": [grown] * dice.choice((1, 2, 5, 12))}]
        made["decoder"] = dice.choice(odd)
    elif part == "processor":
        text = {"Sequence": {"id": "A", "type_id": 0}}
        odd = [[{"SpecialToken": {"id": "nothing", "type_id": 0}}], [], [text] * 5, [text] * 1000]
        made["post_processor"] = {"type": "TemplateProcessing", "single": dice.choice(odd), "pair": [], "special_tokens": {}}
    elif part == "ids":
        vocab = made["model"]["vocab"]
        for token in dice.sample(list(vocab), 5):
            vocab[token] = dice.choice((0, 1, 2**31, 2**32 - 1, 10**6))
    else:
        flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
        count = dice.choice((1000, 20_000))
        made["added_tokens"] += [{"id": 10**6 + n, "content": f"<token{n}>", **flags} for n in range(count)]
    return part
