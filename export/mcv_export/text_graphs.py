"""`tokenizer.onnx` and `detokenizer.onnx`, for hosts without Python: made of onnxruntime-extensions' operators, and proved.

`tokenizer.onnx` takes `text` (one string) and gives `ids` [1, tokens]; `detokenizer.onnx` takes `ids` [tokens] and gives `text`
(one string, control tokens included). Both do what `tokenizer.json` says with Hugging Face's `tokenizers`, for whole texts, and
every build proves it on a corpus. Seen to differ all the same with onnxruntime-extensions 0.15.2: U+0085 and letters newer
than Unicode 13 count as punctuation where a text is cut into words; U+0338 right behind a control token's `>` is composed with
it where the tokenizer composes (NFC); U+0000 is dropped.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
from onnx.helper import make_model, make_node, make_opsetid, make_tensor_value_info
from tokenizers import Tokenizer

from mcv_export.nfc import nfc_graph
from mcv_export.text_probes import PROBES
from mcv_runtime.errors import CheckpointError

TOKENIZER, DETOKENIZER = "tokenizer.onnx", "detokenizer.onnx"

_EXTENSIONS = "ai.onnx.contrib"
_ANYWAY = "build without --text-graphs"


def write_text_graphs(tokenizer_json: str, folder: Path) -> None:
    """Write both graphs to `folder`; raises `CheckpointError` with the first difference where they are not exact."""
    try:
        tokenizer = Tokenizer.from_str(tokenizer_json)
    except Exception as error:  # tokenizers raises bare Exception
        raise CheckpointError(f"tokenizer.json cannot be used ({error}); download it again") from None
    _save(_tokenizer_graph(tokenizer_json, tokenizer), folder / TOKENIZER)
    _save(_detokenizer_graph(tokenizer_json), folder / DETOKENIZER)
    _prove(tokenizer, folder)


def text_session(path: Path) -> onnxruntime.InferenceSession:
    """Load a text graph; raises `CheckpointError` if onnxruntime-extensions does not take it."""
    from onnxruntime_extensions import get_library_path  # takes seconds: it looks for transformers and torch

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4  # what fails is said by the error
    options.register_custom_ops_library(get_library_path())
    try:
        return onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    except Exception as error:  # onnxruntime raises several classes that share no base
        reason = str(error).partition("initialization: ")[2].split("\n")[0] or str(error).split("\n")[0]
        raise CheckpointError(
            f"{path.name} cannot be made: onnxruntime-extensions rejects the tokenizer ({reason.strip()}); {_ANYWAY}"
        ) from None


def _tokenizer_graph(tokenizer_json: str, tokenizer: Tokenizer) -> onnx.GraphProto:
    settings = json.loads(tokenizer_json)
    end = _end_token(settings)
    frame = tokenizer.encode("").ids  # what the tokenizer puts before a text (BOS)
    constants = {"frame": np.array([frame], np.int64).reshape(1, -1)}
    constants |= {"from_start": np.array([0]), "to_end": np.array([-1]), "axis": np.array([1])}
    graph = onnx.GraphProto(name="tokenizer")
    graph.input.append(make_tensor_value_info("text", onnx.TensorProto.STRING, [1]))
    graph.output.append(make_tensor_value_info("ids", onnx.TensorProto.INT64, [1, "tokens"]))
    graph.initializer.extend(onnx.numpy_helper.from_array(value, name) for name, value in constants.items())
    graph.node.append(make_node("Constant", [], ["end"], value_strings=[end.encode()]))
    # The operator drops the end of a text that breaks off inside a control token ("a <|im_"): no text ends there.
    graph.node.append(make_node("StringConcat", ["text", "end"], ["ended"], domain=_EXTENSIONS))
    text = "ended"
    if _uses_nfc(settings):
        _add_nfc(graph)
        text = "composed"
    graph.node.append(_hf_json_node(tokenizer_json, text, "ended_ids", llama=_prepends(settings)))
    graph.node.append(make_node("Slice", ["ended_ids", "from_start", "to_end", "axis"], ["text_ids"]))
    graph.node.append(make_node("Concat", ["frame", "text_ids"], ["ids"], axis=1))
    return graph


def _end_token(settings: dict[str, Any]) -> str:
    """A control token that leaves the text before it as it is."""
    for token in settings["added_tokens"]:
        if token["special"] and not (token["lstrip"] or token["normalized"] or token["single_word"]):
            return str(token["content"])
    raise CheckpointError(f"{TOKENIZER} cannot be made: the tokenizer has no special token that can end a text; {_ANYWAY}")


def _add_nfc(graph: onnx.GraphProto) -> None:
    """`ended` -> `composed`: its bytes as tokens of a vocabulary of bytes, composed, and back."""
    bytes_only = Tokenizer.from_str(json.dumps(_bytes_tokenizer()))
    composing = nfc_graph()
    graph.initializer.extend(composing.initializer)
    graph.node.append(_hf_json_node(bytes_only.to_str(), "ended", "byte_rows", llama=False))
    graph.node.append(make_node("Reshape", ["byte_rows", "flat"], ["bytes"]))
    graph.node.extend(composing.node)
    graph.node.append(_decoder_node(json.loads(bytes_only.to_str()), "composed_bytes", "composed"))


def _hf_json_node(tokenizer_json: str, source: str, ids: str, *, llama: bool) -> onnx.NodeProto:
    # The class only chooses between the two ways in which the operator treats spaces; BOS and EOS are ours.
    config: dict[str, Any] = {"tokenizer_class": "LlamaTokenizer" if llama else "Qwen2Tokenizer", "add_bos_token": False}
    config |= {"add_eos_token": False, "clean_up_tokenization_spaces": False, "model_max_length": 1 << 30}
    return make_node(
        "HfJsonTokenizer",
        [source],
        [ids],
        domain=_EXTENSIONS,
        tokenizer_vocab=tokenizer_json,
        tokenizer_config=json.dumps(config),
    )


def _detokenizer_graph(tokenizer_json: str) -> onnx.GraphProto:
    graph = onnx.GraphProto(name="detokenizer")
    graph.input.append(make_tensor_value_info("ids", onnx.TensorProto.INT64, ["tokens"]))
    graph.output.append(make_tensor_value_info("text", onnx.TensorProto.STRING, [1]))
    # The operator ends the process (division by zero) for no ids at all.
    decode = onnx.GraphProto(name="decode", node=[_decoder_node(json.loads(tokenizer_json), "ids", "decoded")])
    decode.output.append(make_tensor_value_info("decoded", onnx.TensorProto.STRING, [1]))
    nothing = make_node("Constant", [], ["nothing"], value_strings=[b""])
    empty = onnx.GraphProto(name="empty", node=[nothing])
    empty.output.append(make_tensor_value_info("nothing", onnx.TensorProto.STRING, [1]))
    graph.node.append(make_node("Size", ["ids"], ["length"]))
    graph.node.append(make_node("Cast", ["length"], ["has_ids"], to=onnx.TensorProto.BOOL))
    graph.node.append(make_node("If", ["has_ids"], ["text"], then_branch=decode, else_branch=empty))
    return graph


def _decoder_node(settings: dict[str, Any], ids: str, text: str) -> onnx.NodeProto:
    by_id = {number: token for token, number in settings["model"]["vocab"].items()}
    added = {token["id"]: token["content"] for token in settings["added_tokens"]}
    by_id |= added
    alphabet = {"\N{LOWER ONE EIGHTH BLOCK}": ord(" ")} if _prepends(settings) else _byte_alphabet()
    return make_node(
        "BpeDecoder",
        [ids],
        [text],
        domain=_EXTENSIONS,
        id_vocab="\n".join(by_id.get(number, "") for number in range(max(by_id) + 1)),
        byte_decoder="\n".join(f"{ord(character)}\t{byte}" for character, byte in alphabet.items()),
        added_tokens="\n".join(f"{number}\t{content}" for number, content in added.items()),
        all_special_ids="\n".join(str(token["id"]) for token in settings["added_tokens"] if token["special"]),
        skip_special_tokens=0,
    )


def _bytes_tokenizer() -> dict[str, Any]:
    """The tokenizer whose ids are the bytes of the text."""
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    return {
        "version": "1.0",
        "added_tokens": [],
        "normalizer": None,
        "pre_tokenizer": byte_level,
        "post_processor": None,
        "decoder": byte_level,
        "model": {"type": "BPE", "vocab": _byte_alphabet(), "merges": []},
    }


def _byte_alphabet() -> dict[str, int]:
    """The printable characters by which byte-level tokenizers write bytes: a byte's own in Latin-1, or the next free one."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    hidden = [byte for byte in range(256) if byte not in printable]
    return {chr(byte if byte in printable else 256 + hidden.index(byte)): byte for byte in range(256)}


def _uses_nfc(settings: dict[str, Any]) -> bool:
    normalizer = settings.get("normalizer") or {}
    return "NFC" in (part.get("type") for part in [normalizer, *normalizer.get("normalizers", [])])


def _prepends(settings: dict[str, Any]) -> bool:
    """Whether this is a tokenizer in the manner of SentencePiece, with spaces written as a visible character."""
    return "\N{LOWER ONE EIGHTH BLOCK}" in json.dumps(settings.get("decoder"), ensure_ascii=False)


def _save(graph: onnx.GraphProto, path: Path) -> None:
    opsets = [make_opsetid("", 18), make_opsetid(_EXTENSIONS, 1)]
    onnx.save(make_model(graph, opset_imports=opsets, ir_version=10, producer_name="mcv"), path)


def _prove(tokenizer: Tokenizer, folder: Path) -> None:
    """Compare both graphs with `tokenizer` on every probe."""
    encode, decode = text_session(folder / TOKENIZER), text_session(folder / DETOKENIZER)
    for probe in [*PROBES, *_control_probes(tokenizer), *_vocabulary_probes(tokenizer)]:
        ids = tokenizer.encode(probe).ids
        found = encode.run(["ids"], {"text": np.array([probe], dtype=object)})[0][0].tolist()
        if found != ids:
            theirs, ours = ([str(tokenizer.id_to_token(number)) for number in numbers] for numbers in (ids, found))
            raise CheckpointError(_difference(TOKENIZER, probe, ours, theirs))
        text = tokenizer.decode(ids, skip_special_tokens=False)
        back = decode.run(["text"], {"ids": np.array(ids, dtype=np.int64)})[0][0]
        if back != text:
            raise CheckpointError(_difference(DETOKENIZER, probe, back, text))


def _difference(graph: str, probe: str, found: Sequence[str], expected: Sequence[str]) -> str:
    same = next((i for i, (a, b) in enumerate(zip(found, expected, strict=False)) if a != b), min(len(found), len(expected)))
    said, right = (repr(part[same : same + 4]) for part in (found, expected))
    text = probe if len(probe) <= 80 else f"{probe[:77]}..."
    return f"{graph} is not exact: for {text!r} it gives {said} at {same} where tokenizer.json gives {right}; {_ANYWAY}"


def _control_probes(tokenizer: Tokenizer) -> list[str]:
    """Every added token: inside a text, alone between others, and with a piece missing."""
    tokens = [token.content for _, token in sorted(tokenizer.get_added_tokens_decoder().items())]
    around = [f"one {token}two{token}\n{token} three" for token in tokens]
    return ["".join(tokens), " ".join(tokens), *around, *(token[:-1] for token in tokens)]


def _vocabulary_probes(tokenizer: Tokenizer, most: int = 2000) -> list[str]:
    """What tokens from all over the vocabulary stand for, one by one, without U+0000 and parts of characters."""
    size = tokenizer.get_vocab_size()
    texts = (tokenizer.decode([number], skip_special_tokens=False) for number in range(0, size, -(-size // most)))
    return [text for text in texts if not {"\N{NULL}", "\N{REPLACEMENT CHARACTER}"} & set(text)]
