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


@pytest.fixture
def session():
    return FakeSession()


@pytest.fixture
def decoder(session):
    return Decoder(lambda name: session, manifest())


def test_a_prompt_in_pieces_then_steps(decoder, session):
    slots = decoder.new_slots()
    row = decoder.new_row(slots, 20)
    embeds = np.arange(4 * HIDDEN, dtype=np.float32).reshape(4, HIDDEN)
    places = np.array([1, 2, 3, 6])
    for start, end in ((0, 3), (3, 6), (6, 8)):
        first, last = np.searchsorted(places, (start, end))
        wanted = (-1,) if end == 8 else ()
        logits = decoder.read(slots, row, range(start, end), embeds[first:last], places[first:last] - start, wanted=wanted)
    assert logits.argmax() == 8
    assert decoder.step(slots, [row], [4]).argmax() == 5
    assert decoder.read(slots, row, [1, 2, 3], wanted=(0, 1, 2)).argmax(-1).tolist() == [2, 3, 4]

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
        ([[1, 2, 3]], [], [], [0, 1, 2], [11], 12),
    ]
    for name, spec in manifest().graphs["decoder_with_past"].inputs.items():
        if name != "past.0":
            assert all(call[name].dtype == spec.dtype and call[name].ndim == len(spec.shape) for call in session.calls)


def test_rows_side_by_side_are_one_run(decoder, session):
    slots = decoder.new_slots()
    rows = [decoder.new_row(slots, 20) for _ in range(3)]
    for number, row in enumerate(rows):
        decoder.read(slots, row, range(number + 1))
    slots.drop(rows[1])
    (group,) = slots.ranges([rows[2], rows[0]])
    assert decoder.step(slots, group, [group.index(row) + 1 for row in group]).argmax(-1).tolist() == [2, 3]
    assert session.calls[-1]["seqlens_k"].tolist() == [row.length - 1 for row in group]
    assert session.binding.shared["past.0"] is session.binding.shared["present.0"]
    assert session.binding.shared["past.0"].shape() == [2, 2, 100, 4]  # no longer than the context


def test_a_row_is_never_overrun(decoder):
    slots = decoder.new_slots()
    row = decoder.new_row(slots, 100)
    decoder.read(slots, row, [0] * 100)
    with pytest.raises(OptionError, match="101"):
        decoder.step(slots, [row], [1])
    assert row.length == 100
