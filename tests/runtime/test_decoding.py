"""The decode loop, with a fake session: no model needed."""

import numpy as np
import pytest

from mcv_runtime.bundle.manifest import (
    CacheEntry,
    GenerationSpec,
    GraphSpec,
    ImageSpec,
    Manifest,
    PlaceholderSpec,
    TensorSpec,
    TextSpec,
)
from mcv_runtime.decoding.decoder import Decoder
from mcv_runtime.errors import OptionError

VOCAB, HIDDEN = 10, 3


class FakeBinding:
    def __init__(self):
        self.inputs, self.shared, self.result = {}, {}, None

    def bind_cpu_input(self, name, array):
        assert isinstance(array, np.ndarray)
        self.inputs[name] = array

    def bind_ortvalue_input(self, name, value):
        self.shared[name] = value

    def bind_ortvalue_output(self, name, value):
        self.shared[name] = value

    def bind_output(self, name, device):
        self.result = None

    def get_outputs_as_ortvaluevector(self):
        return [self]

    def numpy(self):
        return self.result


class FakeSession:
    """Says that token t is followed by t + 1; remembers what it was given."""

    def __init__(self):
        self.calls = []

    def io_binding(self):
        self.binding = FakeBinding()
        return self.binding

    def run_with_iobinding(self, binding):
        self.calls.append(dict(binding.inputs))
        wanted = binding.inputs["input_ids"].reshape(-1)[binding.inputs["logit_positions"]]
        binding.result = np.eye(VOCAB, dtype=np.float32)[(wanted + 1) % VOCAB]


def manifest(cache_shape=("batch", 2, "cache_length", 4)):
    names = {
        "input_ids": ("int64", ("batch", "sequence")),
        "vision_embeds": ("float32", ("visual", HIDDEN)),
        "vision_positions": ("int64", ("visual",)),
        "logit_positions": ("int64", ("rows",)),
        "seqlens_k": ("int32", ("batch",)),
        "total_sequence_length": ("int32", ()),
        "past.0": ("float32", cache_shape),
    }
    inputs = {name: TensorSpec(dtype=dtype, shape=shape) for name, (dtype, shape) in names.items()}
    return Manifest(
        family="fake",
        model="fake",
        graphs={"decoder_with_past": GraphSpec(file="d.onnx", precision="fp32", inputs=inputs, outputs={})},
        cache=(CacheEntry(input="past.0", output="present.0", dtype="float32", shape=cache_shape),),
        image=ImageSpec(),
        placeholder=PlaceholderSpec(token="<unk>", tokens_per_slice=2),
        text=TextSpec(vocab_size=VOCAB, context_length=100),
        generation=GenerationSpec(stop_token_ids=(9,)),
        hidden_size=HIDDEN,
    )


def test_prefill_in_chunks_then_steps():
    session = FakeSession()
    decoder = Decoder(session, manifest())
    cache = decoder.new_cache(20)
    embeds = np.arange(4 * HIDDEN, dtype=np.float32).reshape(4, HIDDEN)
    logits = decoder.prefill(cache, np.arange(8), embeds, np.array([1, 2, 3, 6]), chunk=3)
    assert logits.argmax() == 8
    assert decoder.step(cache, [4]).argmax() == 5

    given = [
        (
            call["input_ids"].tolist(),
            call["vision_positions"].tolist(),
            call["vision_embeds"][:, 0].tolist(),
            call["logit_positions"].tolist(),
            call["seqlens_k"].tolist(),
            call["total_sequence_length"].tolist(),
        )
        for call in session.calls
    ]
    assert given == [
        ([[0, 1, 2]], [1, 2], [0, 3], [], [2], 3),
        ([[3, 4, 5]], [0], [6], [], [5], 6),
        ([[6, 7]], [0], [9], [1], [7], 8),
        ([[4]], [], [], [0], [8], 9),
    ]
    for name, spec in manifest().graphs["decoder_with_past"].inputs.items():
        if name != "past.0":
            assert all(call[name].dtype == spec.dtype and call[name].ndim == len(spec.shape) for call in session.calls)


def test_past_and_present_are_one_buffer_of_the_needed_size():
    session = FakeSession()
    Decoder(session, manifest()).new_cache(20)
    assert session.binding.shared["past.0"] is session.binding.shared["present.0"]
    assert session.binding.shared["past.0"].shape() == [1, 2, 64, 4]
    assert Decoder(session, manifest()).new_cache(99).capacity == 100  # the context's length


def test_cache_is_never_overrun():
    decoder = Decoder(FakeSession(), manifest())
    cache = decoder.new_cache(64)
    decoder.prefill(cache, np.zeros(64, np.int64), np.empty((0, HIDDEN), np.float32), np.empty(0, np.int64))
    with pytest.raises(OptionError, match="65"):
        decoder.step(cache, [1])
