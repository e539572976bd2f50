"""Which slices go through the graphs together, and what happens when memory is short."""

import tracemalloc

import numpy as np
import pytest

from mcv_runtime import OptionError, ResourceError, RunError
from mcv_runtime.bundle.manifest import Manifest
from mcv_runtime.pictures.picture import pack, slice_picture
from mcv_runtime.vision.encoder import VisionEncoder
from mcv_runtime.vision.slice_batches import BatchPace, slice_bytes

PATCHES = 32 * 32


class FakeTower:
    """Sessions whose visual tokens are the mean of a slice's pixels, and that have no memory for more than `limit` slices."""

    def __init__(self, manifest: Manifest, limit: int = 99, error: type[Exception] = MemoryError) -> None:
        self.manifest, self.limit, self.error = manifest, limit, error
        self.batches: list[tuple[int, ...]] = []
        self.tried: list[int] = []

    def __call__(self, name):
        return self

    def run(self, outputs, feed):
        if outputs == ["vision_embeds"]:
            hidden = feed["vision_hidden"].mean((1, 2))
            tokens, width = self.manifest.placeholder.tokens_per_slice, self.manifest.hidden_size
            return [np.broadcast_to(hidden[:, None, None], (len(hidden), tokens, width)).astype(np.float32)]
        pixels = feed["pixel_values"]
        self.tried.append(len(pixels))
        if len(pixels) > self.limit:
            raise self.error("Failed to allocate memory for requested buffer of size 123")
        self.batches.append(pixels.shape[:2])
        return [np.repeat(pixels.mean(2, keepdims=True), 8, axis=2)]


@pytest.fixture(scope="module")
def manifest(golden_engine_module):
    return golden_engine_module.bundle.manifest


@pytest.fixture(scope="module")
def golden_engine_module(engine_of):
    return engine_of("minicpmv2_6")


def shades(manifest, count, size=(448, 448), **options):
    return [
        slice_picture(np.full((size[1], size[0], 3), 10 + 2 * i, np.uint8), manifest.image, **options) for i in range(count)
    ]


def means(pictures):
    """The shade that each slice of each picture was encoded from."""
    return [sorted(set(((picture.embeds[:, 0] + 1) * 127.5).round(2).tolist())) for picture in pictures]


def test_equal_slices_share_a_run_and_land_where_they_belong(manifest):
    tower = FakeTower(manifest)
    encoder = VisionEncoder(tower, manifest, batch_slices=3)
    pictures = [*shades(manifest, 4), *shades(manifest, 1, (448, 896)), *shades(manifest, 2)[1:]]
    encoded = encoder.encode(pictures)
    sizes = [size for picture in pictures for size in picture.grid.sizes]
    assert sorted(tower.batches, reverse=True)[:1] == [(3, PATCHES)]
    assert sum(count for count, _ in tower.batches) == len(sizes) - 1  # the last picture is the second one again
    assert means(encoded) == [[10], [12], [14], [16], [10], [12]]
    assert [len(picture.embeds) for picture in encoded] == [64 * len(picture.grid.sizes) for picture in pictures]
    assert encoded[1].fingerprint == encoded[-1].fingerprint


@pytest.mark.parametrize("error", [MemoryError, RuntimeError])
def test_too_little_memory_means_smaller_batches(manifest, error):
    from mcv_runtime.sessions.graphs import GuardedSession

    tower = FakeTower(manifest, limit=2, error=error)
    guarded = GuardedSession(tower, "vision_encoder")
    encoder = VisionEncoder(lambda name: guarded, manifest, batch_slices=8)
    assert means(encoder.encode(shades(manifest, 10))) == [[10 + 2 * i] for i in range(10)]
    assert tower.tried == [8, 4, 2, 2, 2, 2, 2]
    tower.tried.clear()
    encoder.encode(shades(manifest, 14)[10:])
    assert tower.tried == [2, 2]  # what failed is not tried again


def test_numbers_that_are_none_are_no_picture(manifest):
    class Damaged(FakeTower):
        def run(self, outputs, feed):
            return [np.full_like(value, np.nan) for value in super().run(outputs, feed)]

    with pytest.raises(RunError, match="the tower gave numbers that are none"):
        VisionEncoder(Damaged(manifest), manifest).encode(shades(manifest, 1))


def test_whoever_waits_may_ask_for_small_batches(manifest):
    """Between batches others get their turn; a picture that is made by one encoding is waited for by another."""
    tower, asked = FakeTower(manifest), []
    encoder = VisionEncoder(tower, manifest, batch_slices=8)
    first = encoder.encoding(shades(manifest, 4), at_once=lambda: asked.append(1) or 2)
    second = encoder.encoding(shades(manifest, 4)[2:])
    assert (next(first), next(second), next(first), len(asked)) == (2, 0, 2, 2)
    for encoding, shown in ((second, (14, 16)), (first, (10, 12, 14, 16))):
        with pytest.raises(StopIteration) as end:
            next(encoding)
        assert means(end.value.value) == [[shade] for shade in shown]
    assert tower.batches == [(2, PATCHES)] * 2


def test_one_that_gives_up_leaves_the_picture_to_those_who_wait(manifest):
    encoder = VisionEncoder(FakeTower(manifest), manifest, batch_slices=1)
    first, second = (encoder.encoding(shades(manifest, 2)) for _ in range(2))
    assert (next(first), next(second)) == (1, 0)
    first.close()
    assert next(second) == 1
    with pytest.raises(StopIteration):
        next(second)


def test_no_memory_for_one_slice_is_one_line(manifest):
    tower = FakeTower(manifest, limit=0)
    encoder = VisionEncoder(tower, manifest, batch_slices=4)
    with pytest.raises(ResourceError, match="memory to encode a slice of 448 x 448 pixels") as caught:
        encoder.encode(shades(manifest, 4))
    assert isinstance(caught.value, MemoryError)
    assert tower.tried == [4, 2, 1]
    tower.limit = 1
    assert means(encoder.encode(shades(manifest, 2))) == [[10], [12]]  # the encoder is as good as before


def test_the_budget_bounds_the_batch(manifest):
    each = slice_bytes(manifest.graphs["vision_encoder"], PATCHES)
    tower = FakeTower(manifest)
    VisionEncoder(tower, manifest, batch_slices=8, memory_bytes=int(2.5 * each)).encode(shades(manifest, 6))
    assert max(count for count, _ in tower.batches) == 2
    tower = FakeTower(manifest)
    VisionEncoder(tower, manifest, batch_slices=8, memory_bytes=int(0.1 * each)).encode(shades(manifest, 3))
    assert tower.batches == [(1, PATCHES)] * 3


def test_pixels_of_a_batch_only_are_floats(manifest):
    """36 slices at once would be 87 MB of float pixels; one slice takes 2.4 MB, in a few copies."""
    sliced = slice_picture(np.zeros((2688, 2688, 3), np.uint8), manifest.image, max_slice_nums=36)
    assert len(sliced.slices) == 37
    encoder = VisionEncoder(FakeTower(manifest), manifest, batch_slices=1)
    tracemalloc.start()
    try:
        (picture,) = encoder.encode([sliced])
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert len(picture.embeds) == 37 * 64
    assert peak - picture.embeds.nbytes < 20e6


def paced(seconds, total, most=99):
    """The batch sizes that are taken of `total` slices, and what was decided."""
    pace, sizes = BatchPace("auto", most), []
    while total:
        size = pace.next(total)
        pace.took(size, seconds[size])
        sizes.append(size)
        total -= size
    return sizes, pace.decision


def test_a_batch_is_tried_and_kept_only_if_faster():
    assert paced({1: 1.0, 4: 0.5}, 22) == ([1, 1, 4, 4, 4, 4, 4], 4)
    assert paced({1: 1.0, 4: 0.97}, 14) == ([1, 1, 4, 4, 1, 1, 1, 1], 1)  # no gain worth the memory


def test_a_trial_fits_what_is_left_and_the_memory():
    assert paced({1: 1.0, 3: 1.1}, 9) == ([1, 1, 3, 3, 1], 1)
    assert paced({1: 1.0, 2: 0.5}, 8, most=2) == ([1, 1, 2, 2, 2], 2)
    assert paced({1: 1.0}, 5, most=1) == ([1] * 5, None)
    assert paced({1: 1.0}, 3) == ([1, 1, 1], None)


def test_a_failed_trial_becomes_a_smaller_one():
    pace = BatchPace("auto", 99)
    for _ in range(2):
        pace.took(pace.next(20), 1.0)
    assert pace.next(18) == 4
    pace.failed(4)
    assert pace.next(18) == 2
    pace.failed(2)
    assert pace.next(18) == 1


def test_batches_change_no_result(engine_of):
    """On real graphs, against one by one: float noise at most; both modes of the merger too."""
    rng = np.random.default_rng(5)
    for family, modes in (
        ("minicpmv4_6", ("16x", "4x")),
        ("minicpmv2_0", (None,)),
        ("minicpmv2_5", (None,)),
    ):
        single = engine_of(family)
        manifest, sessions = single.bundle.manifest, single._vision._tower._sessions
        alone, batched = (VisionEncoder(sessions, manifest, batch_slices=size) for size in (1, 4))
        image = manifest.image
        for mode in modes:
            pixels = rng.integers(0, 256, (700, 900, 3), dtype=np.uint8)
            sliced = [slice_picture(part, image, downsample_mode=mode) for part in (pixels, pixels[:300], pixels[100:400])]
            for one, other in zip(alone.encode(sliced), batched.encode(sliced), strict=True):
                np.testing.assert_allclose(one.embeds, other.embeds, rtol=0, atol=1e-4)
                assert one.fingerprint == other.fingerprint


def test_frames_of_a_pack_share_runs(engine_of):
    engine = engine_of("minicpmv4_5")
    manifest, sessions = engine.bundle.manifest, engine._vision._tower._sessions
    rng = np.random.default_rng(6)
    frames = [slice_picture(rng.integers(0, 256, (200, 300, 3), dtype=np.uint8), manifest.image) for _ in range(5)]
    packs = [pack(frames[:3], (0, 3, 6)), pack(frames[3:], (9, 12)), frames[0]]
    alone = VisionEncoder(sessions, manifest, batch_slices=1).encode(packs)
    for size in (2, 3):
        for one, other in zip(alone, VisionEncoder(sessions, manifest, batch_slices=size).encode(packs), strict=True):
            np.testing.assert_allclose(one.embeds, other.embeds, rtol=0, atol=1e-4)
    assert len({picture.fingerprint for picture in alone}) == 3


def test_options(manifest):
    with pytest.raises(OptionError, match="batch_slices"):
        VisionEncoder(FakeTower(manifest), manifest, batch_slices=0)
