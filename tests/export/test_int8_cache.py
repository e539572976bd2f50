"""Keys and values in 8 bits: a second decoder graph on the same weights."""

from pathlib import Path

import numpy as np
import pytest

from mcv_export.build import BuildOptions, build
from mcv_export.calibrate import SampleOptions
from mcv_export.verify import compare
from mcv_runtime import ChatFileError, OptionError, load
from mcv_runtime.bundle.folder import Bundle

TINY = Path(__file__).parents[2] / "models" / "tiny"
QUESTIONS = ["What does the text say?", "Describe the picture.", "What shape is this?", "How many shapes are there?"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    options = BuildOptions(precision="fp32", int8_cache=True, samples=SampleOptions(count=4))
    return build(TINY / "checkpoint", tmp_path_factory.mktemp("kv8") / "bundle", options).folder


def test_it_answers_alike_in_a_quarter_of_the_memory(folder):
    plain, small = load(folder, threads=1), load(folder, threads=1, kv="int8")
    for question in QUESTIONS:
        assert small.ask(TINY / "demo.png", question).text == plain.ask(TINY / "demo.png", question).text
    for engine in (plain, small):
        chat = engine.chat()
        chat.ask(TINY / "demo.png", QUESTIONS[0])
        chat.ask(None, QUESTIONS[1])
    full, quarter = (engine._scheduler.slots for engine in (plain, small))
    assert [row.length for row in full.rows] == [row.length for row in quarter.rows]
    assert 0 < quarter.kept_bytes * 4 == full.kept_bytes


def test_beams_batches_and_files_work_with_it(folder, tmp_path):
    small = load(folder, threads=1, kv="int8")
    assert small.ask(TINY / "demo.png", QUESTIONS[1], num_beams=3).text == "a red circle and the text HELLO"
    chat = small.chat()
    chat.ask(TINY / "demo.png", QUESTIONS[0])
    chat.save(tmp_path / "chat.mcv")
    assert small.load_chat(tmp_path / "chat.mcv").ask(None, QUESTIONS[1]).reused_tokens > 64
    with pytest.raises(ChatFileError, match="int8"):
        load(folder).load_chat(tmp_path / "chat.mcv")


def test_a_hybrid_decoder(golden_root, tmp_path, bundle_of, read_prompt):
    options = BuildOptions(precision="fp32", int8_cache=True, samples=SampleOptions(count=3))
    folder = build(golden_root / "minicpmv4_6" / "checkpoint", tmp_path / "bundle", options).folder
    plain, small = load(folder, threads=1), load(folder, threads=1, kv="int8")
    prompt = plain.prompt([{"role": "user", "content": "What is written on the wall? " * 8}])
    none = np.empty((0, plain.bundle.manifest.hidden_size), np.float32)
    full, rounded = (read_prompt(engine, prompt, none)[-1] for engine in (plain, small))
    error = np.linalg.norm(rounded - full) / np.linalg.norm(full)
    assert 0 < error < 0.05
    with pytest.raises(OptionError, match="--kv int8"):
        load(bundle_of("minicpmv4_6"), kv="int8")


def test_it_reads_the_same_weights_and_the_bundle_is_sound(folder):
    names = sorted(path.name for path in (folder / "onnx").iterdir())
    assert [name for name in names if name.startswith("decoder")] == [
        "decoder_with_past.onnx",
        "decoder_with_past.onnx.data",
        "decoder_with_past_kv8.onnx",
    ]
    assert len(list(Bundle.open(folder).verify())) == len(Bundle.open(folder).manifest.files)
    assert compare(Bundle.open(folder), TINY / "checkpoint").passed
