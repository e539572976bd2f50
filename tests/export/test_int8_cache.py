"""Keys and values in 8 bits: a second decoder graph on the same weights."""

import re
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import onnx_ir as ir
import pytest
from safetensors.torch import load_file, save_file

from mcv_calibration.accuracy import check_same_model
from mcv_calibration.accuracy import compare as compare_bundles
from mcv_calibration.contender import INT8_CACHE, Contender
from mcv_calibration.gate import Gate
from mcv_calibration.samples import Sample, builtin_samples
from mcv_export.build import BuildOptions, build
from mcv_export.calibrate import SampleOptions
from mcv_export.int8_cache import reach
from mcv_export.verify import compare
from mcv_runtime import ChatFileError, OptionError, load
from mcv_runtime.bundle.folder import Bundle
from mcv_runtime.sessions.graphs import cpu_session, session_options

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


def test_a_comparison_reads_it_too(folder):
    """Against the bundle itself this graph alone has an error, which a gate sees; without it, it is the same model."""
    bundle = Contender(folder, threads=1)
    graphs = {name: spec for name, spec in bundle.manifest.graphs.items() if name != INT8_CACHE}
    check_same_model(SimpleNamespace(manifest=replace(bundle.manifest, graphs=graphs), folder=folder), bundle)
    sample = Sample((TINY / "demo.png",), QUESTIONS[1])
    found = compare_bundles(bundle, [bundle], [sample], max_new_tokens=8).candidates[0].accuracy
    assert found.together.kl_max == 0 < found.int8_cache.kl_mean < 0.05
    assert (found.int8_cache.tokens, found.int8_cache.agreement) == (8, 1)
    assert "divergence, keys and values in 8 bits, " in Gate(max_kl=0).miss(found)
    assert Gate(max_kl=0.05, min_agreement=1).miss(found) is None


def test_a_bundle_remembers_what_calibrated_it(folder):
    assert Bundle.open(folder).manifest.calibration == tuple(sorted(builtin_samples(4).digests()))


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


@pytest.mark.parametrize("family", ["minicpmv2_6", "minicpmv4_5", "minicpmv4_6"])
def test_keys_of_a_short_prompt_say_what_keys_become_at_32_000_positions(family, copied, tmp_path):
    """Rotated in the attention, behind a norm, or before it and in part; one channel of each pair is eight times the other."""
    checkpoint = copied(family)
    (file,) = checkpoint.glob("*.safetensors")
    tensors = load_file(file)
    normed = any("k_norm" in name for name in tensors)
    for name, tensor in tensors.items():
        if family == "minicpmv4_6" and "k_norm" in name:  # stored less 1; an eighth of a head is half of what is rotated
            tensor[: len(tensor) // 8] = 7
        elif "k_norm" in name:
            tensor[: len(tensor) // 2] *= 8
        elif re.search(r"layers.\d+.self_attn.k_proj", name) and name.startswith("llm") and not normed:
            heads = tensor.view(2, -1, *tensor.shape[1:])
            heads[:, : heads.shape[1] // 2] *= 8
    save_file(tensors, file)
    options = BuildOptions(precision="fp32", int8_cache=True, samples=SampleOptions(count=3))
    bundle = Bundle.open(build(checkpoint, tmp_path / "bundle", options).folder)
    scales = {
        name.removesuffix(".scale"): value.const_value.numpy()
        for name, value in ir.load(bundle.graph("decoder_with_past_kv8")).graph.initializers.items()
        if name.endswith("key.scale")
    }
    prompt = load(bundle.folder, reuse=False).prompt([{"role": "user", "content": "What is written on the wall?"}])
    outputs = {entry.input: entry.output for entry in bundle.manifest.cache}
    session = cpu_session(bundle.graph("decoder_with_past"), session_options(1))
    feed = far_feed(bundle.manifest.graphs["decoder_with_past"].inputs, prompt.ids, 32_000)
    for name, keys in zip(scales, session.run([outputs[name] for name in scales], feed), strict=True):
        levels = np.abs(keys[:, :, 32_000:] / scales[name])
        assert levels.max() > 30
        assert (levels <= 127.5).mean() > 0.995  # other words may have a little longer keys than those that were read


def far_feed(inputs, ids, position):
    """These ids behind so many tokens of which nothing is left: keys and values of 0."""
    count = len(ids)
    values = {
        "input_ids": ids[None],
        "vision_positions": np.empty(0),
        "position_ids": position + np.arange(count),
        "logit_positions": np.array([count - 1]),
        "seqlens_k": np.array([position + count - 1]),
        "total_sequence_length": np.array([position + count]),
    }
    feed = {}
    for name, spec in inputs.items():
        shape = [{"batch": 1, "cache_length": position, "visual": 0, "sequence": count}.get(n, n) for n in spec.shape]
        if name in values:
            wanted = values[name]
            if name == "position_ids":
                wanted = np.broadcast_to(wanted, shape)
            feed[name] = np.ascontiguousarray(wanted, spec.dtype)
        else:
            feed[name] = np.zeros(shape, spec.dtype)
    return feed


def test_a_pair_keeps_its_length():
    """Against turning it by every angle."""
    rng = np.random.default_rng(0)
    keys = rng.normal(size=(2, 5, 12)).astype(np.float32)
    low, high, rest = np.split(keys, (4, 8), axis=-1)
    angles = np.linspace(0, 2 * np.pi, 4001)[:, None, None, None]
    turned = np.abs(
        np.concatenate((low * np.cos(angles) - high * np.sin(angles), high * np.cos(angles) + low * np.sin(angles)), -1)
    )
    np.testing.assert_allclose(reach(keys, 8)[..., :8], turned.max(0), rtol=1e-5)
    np.testing.assert_array_equal(reach(keys, 8)[..., 8:], np.abs(rest))
    np.testing.assert_array_equal(reach(keys, 0), np.abs(keys))


def test_it_reads_the_same_weights_and_the_bundle_is_sound(folder):
    names = sorted(path.name for path in (folder / "onnx").iterdir())
    assert [name for name in names if name.startswith("decoder")] == [
        "decoder_with_past.onnx",
        "decoder_with_past.onnx.data",
        "decoder_with_past_kv8.onnx",
    ]
    assert len(list(Bundle.open(folder).verify())) == len(Bundle.open(folder).manifest.files)
    assert compare(Bundle.open(folder), TINY / "checkpoint").passed
