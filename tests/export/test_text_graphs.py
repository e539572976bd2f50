"""tokenizer.onnx and detokenizer.onnx: exact, or refused for a reason that is true."""

import json
import random
import sys
import unicodedata
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from onnxruntime_extensions import get_library_path
from tokenizers import Tokenizer, normalizers

from mcv_export.build import BuildOptions, build
from mcv_export.nfc import nfc_graph
from mcv_export.text_graphs import write_text_graphs
from mcv_runtime.bundle.folder import Bundle
from mcv_runtime.errors import CheckpointError

TINY = Path(__file__).parents[2] / "models" / "tiny" / "checkpoint"
POINTS = [point for point in range(1, sys.maxunicode + 1) if not 0xD800 <= point < 0xE000]
MARKED = [p for p in POINTS if unicodedata.combining(chr(p)) or unicodedata.decomposition(chr(p)) or 0x1100 <= p < 0x1200]
SPACES = [point for point in POINTS if chr(point).isspace() or unicodedata.category(chr(point)) in ("Cc", "Cf")]

NOT_LOADED, OTHER_MERGES = r"rejects the tokenizer \(Invalid regex: .*\\p\{M\}", r"tokenizer.onnx is not exact: for .*3\.14159"
REFUSED = {"minicpmv2_0": OTHER_MERGES, "minicpmv4_0": OTHER_MERGES}
REFUSED |= dict.fromkeys(("minicpmv4_6", "minicpmv4_7", "minicpm_ocr"), NOT_LOADED)


@pytest.fixture(scope="module")
def tokenizer_json(golden_root: Path) -> str:
    return (golden_root / "minicpmv2_6" / "checkpoint" / "tokenizer.json").read_text(encoding="utf-8")


def _open(path: Path) -> onnxruntime.InferenceSession:
    """As any host opens it."""
    options = onnxruntime.SessionOptions()
    options.register_custom_ops_library(get_library_path())
    return onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])


@pytest.mark.parametrize("name", ["tiny", "minicpmv2_5", "minicpmv2_6", "minicpmv4_5"])
def test_exact(name: str, golden_root: Path, tmp_path: Path) -> None:
    path = (TINY if name == "tiny" else golden_root / name / "checkpoint") / "tokenizer.json"
    if not path.exists():
        pytest.skip("not in this golden folder")
    write_text_graphs(path.read_text(encoding="utf-8"), tmp_path)
    tokenizer, encode, decode = (
        Tokenizer.from_file(str(path)),
        _open(tmp_path / "tokenizer.onnx"),
        _open(tmp_path / "detokenizer.onnx"),
    )
    tokens = [token.content for token in tokenizer.get_added_tokens_decoder().values()]
    for text in ["", *_texts(300, tokens)]:
        ids = tokenizer.encode(text).ids
        assert encode.run(None, {"text": np.array([text], dtype=object)})[0].tolist() == [ids]
        (back,) = decode.run(None, {"ids": np.array(ids, dtype=np.int64)})
        assert back.tolist() == [tokenizer.decode(ids, skip_special_tokens=False)]


@pytest.mark.parametrize("name", REFUSED)
def test_refused(name: str, golden_root: Path, tmp_path: Path) -> None:
    path = golden_root / name / "checkpoint" / "tokenizer.json"
    if not path.exists():
        pytest.skip("not in this golden folder")
    with pytest.raises(CheckpointError, match=REFUSED[name]) as error:
        write_text_graphs(path.read_text(encoding="utf-8"), tmp_path)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda t: _split(t).update(Regex=_split(t)["Regex"].replace(r"\p{L}+", r"[\p{L}\p{M}]+")), NOT_LOADED),
        (lambda t: t.update(normalizer={"type": "Lowercase"}), r"not exact: for 'Hello world' it gives \['.*'\] at 0 where"),
        (lambda t: t.update(decoder={"type": "Fuse"}), r"detokenizer.onnx is not exact: for ' ' it gives ' ' at 0 where .*'Ġ'"),
        (lambda t: t.update(added_tokens=[]), "no special token that can end a text"),
        (lambda t: t.update(model={}), "tokenizer.json cannot be used"),
    ],
)
def test_a_difference_is_named(tokenizer_json: str, tmp_path: Path, change: Callable[[Any], Any], said: str) -> None:
    settings = json.loads(tokenizer_json)
    change(settings)
    with pytest.raises(CheckpointError, match=said) as error:
        write_text_graphs(json.dumps(settings), tmp_path)
    assert "\n" not in str(error.value)


def test_nothing_is_left_of_a_refused_build(checkpoint: Path, tmp_path: Path) -> None:
    path = checkpoint / "tokenizer.json"
    settings = json.loads(path.read_text(encoding="utf-8"))
    settings["normalizer"] = {"type": "Lowercase"}
    path.write_text(json.dumps(settings), encoding="utf-8")
    with pytest.raises(CheckpointError, match=r"tokenizer.onnx is not exact"):
        build(checkpoint, tmp_path / "out" / "bundle", BuildOptions(text_graphs=True))
    assert list((tmp_path / "out").iterdir()) == []


def test_a_bundle_with_text_graphs(tmp_path: Path) -> None:
    build(TINY, tmp_path / "bundle", BuildOptions(precision="q8", text_graphs=True))
    bundle = Bundle.open(tmp_path / "bundle")
    assert {"tokenizer.onnx", "detokenizer.onnx"} <= bundle.manifest.files.keys()
    assert "onnxruntime-extensions" in bundle.manifest.tools
    assert set(bundle.verify()) == bundle.manifest.files.keys()


def test_composed_form() -> None:
    """Against tokenizers' own, on every code point that has anything to compose, and on mixtures."""
    opset = [onnx.helper.make_opsetid("", 18)]
    model = onnx.helper.make_model(nfc_graph(), opset_imports=opset, ir_version=10)
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    compose, decompose = normalizers.NFC().normalize_str, normalizers.NFD().normalize_str
    texts = _texts(300, [])
    for text in ["", " ".join(map(chr, MARKED)), *texts, *map(decompose, texts)]:
        content = np.frombuffer(text.encode(), np.uint8).astype(np.int64)
        (found,) = session.run(None, {"bytes": content})
        assert bytes(found.tolist()).decode() == compose(text)


def _texts(count: int, tokens: list[str]) -> list[str]:
    """Mixtures of all scripts, marks, white space, ASCII, and control tokens whole and broken off."""
    choose = random.Random(0)
    pools = (POINTS, MARKED, SPACES, range(0x20, 0x7F), range(0x20, 0x7F), range(0xA0, 0x3000))

    def piece() -> str:
        if tokens and choose.random() < 0.1:
            return choose.choice(tokens)[: choose.choice((3, 5, 99))]
        return chr(choose.choice(choose.choice(pools)))

    return ["".join(piece() for _ in range(choose.randrange(1, 40))) for _ in range(count)]


def _split(settings: dict[str, Any]) -> dict[str, Any]:
    pattern: dict[str, Any] = settings["pre_tokenizer"]["pretokenizers"][0]["pattern"]
    return pattern
