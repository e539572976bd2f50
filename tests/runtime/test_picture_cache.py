"""Pictures are encoded once: in memory, on disk, and when several threads ask at the same time."""

import json
import logging
import os
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from PIL import Image

from mcv_runtime import Bundle, OutputError, RunError, load
from mcv_runtime.pictures.picture import slice_picture
from mcv_runtime.sessions.graphs import cpu_session
from mcv_runtime.vision.encoder import VisionEncoder
from mcv_runtime.vision.picture_cache import PictureCache, vision_identity
from mcv_runtime.vision.picture_store import PictureStore

KEY = "ab" * 32


class Counted:
    """A session factory whose sessions note every run, and may be told to fail or to wait."""

    def __init__(self):
        self.runs, self.failures = [], 0
        self.gate = threading.Event()
        self.gate.set()

    def __call__(self, path, options):
        session, name, mine = cpu_session(path, options), path.name, self

        class Session:
            def run(self, outputs, feed):
                mine.runs.append(name)
                assert mine.gate.wait(60)
                if mine.failures:
                    mine.failures -= 1
                    raise RuntimeError("some operator failed")
                return session.run(outputs, feed)

            def io_binding(self):
                return session.io_binding()

            def run_with_iobinding(self, binding):
                session.run_with_iobinding(binding)

        return Session()


def embeds(value, rows=4):
    return np.full((rows, 8), value, np.float32)


def noise(seed, size=(300, 200)):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8))


def test_a_cached_picture_runs_no_graph(golden_bundle):
    factory = Counted()
    engine = load(golden_bundle, threads=1, session_factory=factory)
    first = engine.ask(noise(1), "What?", max_new_tokens=4)
    runs = len(factory.runs)
    assert runs == 2
    again = engine.ask([np.asarray(noise(1))], "And now?", max_new_tokens=4)  # other source, same pixels
    assert len(factory.runs) == runs
    assert again.pictures[0].embeds is first.pictures[0].embeds
    assert not first.pictures[0].embeds.flags.writeable
    engine.ask(noise(2), "What?", max_new_tokens=1)
    assert len(factory.runs) == 2 * runs


def test_the_least_recently_used_goes_first():
    cache = PictureCache(3 * embeds(0).nbytes)
    for number in range(3):
        assert cache.claim(str(number)) is None
        cache.put(str(number), embeds(number))
    cache.claim("0")
    assert cache.claim("3") is None
    cache.put("3", embeds(3))
    assert cache.claim("1") is None
    cache.release("1")
    assert [cache.claim(key)[0, 0] for key in "023"] == [0, 2, 3]
    assert cache.nbytes == 3 * embeds(0).nbytes
    assert cache.claim("4") is None
    cache.put("4", embeds(4, rows=99))  # larger than the cache
    assert cache.nbytes == 3 * embeds(0).nbytes


def test_fingerprints(engine_of):
    """Equal slices and settings are equal, anything else is not; padding counts where the tower sees it."""
    image = engine_of("minicpmv4_6").bundle.manifest.image
    of = lambda *arguments, **options: slice_picture(*arguments, image, **options).fingerprint  # noqa: E731
    large = noise(3, (900, 700))
    different = [of(noise(1)), of(noise(2)), of(noise(1), downsample_mode="4x"), of(large), of(large, max_slice_nums=2)]
    assert len(set(different)) == len(different)
    assert of(noise(1)) == of(np.asarray(noise(1)))
    strip, plain = engine_of("minicpmv2_5"), engine_of("minicpmv2_6")
    for engine, equal in ((strip, False), (plain, True)):
        small, wide = (slice_picture(noise(4, size), engine.bundle.manifest.image) for size in ((300, 200), (700, 700)))
        encoded = engine._vision.encode([small])[0], engine._vision.encode([wide, small])[1]
        assert (encoded[0].fingerprint == encoded[1].fingerprint) is equal
        assert np.array_equal(encoded[0].embeds, encoded[1].embeds) is equal
    assert len({picture.fingerprint for picture in (encoded[0], strip._vision.encode([small])[0])}) == 2  # other graphs


def test_identity_of_graphs(golden_bundle, bundle_of, tmp_path):
    import shutil

    copy = tmp_path / "copy"
    shutil.copytree(golden_bundle, copy)
    manifest = json.loads((copy / "mcv.json").read_text())
    known = vision_identity(Bundle.open(copy))
    assert known == vision_identity(Bundle.open(golden_bundle))
    assert known != vision_identity(Bundle.open(bundle_of("minicpmv2_6", "q8")))
    manifest["files"] = {}  # then the files themselves are read
    (copy / "mcv.json").write_text(json.dumps(manifest))
    assert vision_identity(Bundle.open(copy)) == known
    data = next(copy.glob("onnx/vision_encoder*.data"))
    data.write_bytes(data.read_bytes()[:-1] + b"x")
    assert vision_identity(Bundle.open(copy)) != known


def test_on_disk_for_the_next_process(golden_bundle, tmp_path):
    factory = Counted()
    first = load(golden_bundle, threads=1, session_factory=factory, cache_dir=tmp_path / "a" / "b").encode_image(noise(1))
    second = load(golden_bundle, threads=1, session_factory=factory, cache_dir=tmp_path / "a" / "b").encode_image(noise(1))
    assert len(factory.runs) == 2
    np.testing.assert_array_equal(first.embeds, second.embeds)
    assert [path.suffix for path in (tmp_path / "a" / "b").iterdir()] == [".mcvpicture"]


@pytest.mark.parametrize("damage", ["truncated", "altered", "empty", "longer", "another picture's"])
def test_a_damaged_entry_is_one_line_and_encoded_again(tmp_path, caplog, damage):
    store = PictureStore(tmp_path, 1_000_000)
    store.put(KEY, embeds(7))
    (path,) = tmp_path.iterdir()
    data = path.read_bytes()
    if damage == "another picture's":
        store.put("cd" * 32, embeds(8))
        data = (tmp_path / f"{'cd' * 32}.mcvpicture").read_bytes()
    changed = {"truncated": data[:-1], "altered": data[:-1] + b"\xff", "empty": b"", "longer": data + b"\0"}.get(damage, data)
    path.write_bytes(changed)
    with caplog.at_level(logging.WARNING):
        assert store.get(KEY) is None
    assert [record.getMessage() for record in caplog.records] == [f"cached picture {path} is damaged; encoding it again"]
    assert not path.exists()
    store.put(KEY, embeds(9))
    np.testing.assert_array_equal(store.get(KEY), embeds(9))


def test_the_folder_stays_below_its_limit(tmp_path):
    size = PictureStore(tmp_path / "one", 10_000)
    size.put(KEY, embeds(0))
    each = next((tmp_path / "one").iterdir()).stat().st_size
    store = PictureStore(tmp_path / "some", 3 * each)
    for number in range(3):
        store.put(str(number), embeds(number))
        os.utime(tmp_path / "some" / f"{number}.mcvpicture", (number, number))
    assert store.get("0") is not None  # now the youngest
    (tmp_path / "some" / ".3.0123456789abcdef").write_bytes(b"left by a process that died")
    store.put("3", embeds(3))
    assert sorted(path.name for path in (tmp_path / "some").iterdir()) == [f"{n}.mcvpicture" for n in (0, 2, 3)]
    store.put("4", embeds(4, rows=999))  # larger than the folder may be
    assert store.get("4") is None


def test_a_folder_that_cannot_be_used(tmp_path, caplog):
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="cache folder"):
        PictureStore(tmp_path / "file" / "cache", 1000)
    store = PictureStore(tmp_path / "gone", 1000)
    (tmp_path / "gone").rmdir()
    store.put(KEY, embeds(1))
    assert store.get(KEY) is None
    assert len(caplog.records) == 1


def test_processes_share_a_folder(tmp_path):
    """Four write and read the same few entries, with room for half of them."""
    code = """
import sys, numpy as np
from mcv_runtime.vision.picture_store import PictureStore
store, rng = PictureStore(sys.argv[1], 40_000), np.random.default_rng(int(sys.argv[2]))
for _ in range(300):
    number = int(rng.integers(10))
    found = store.get(str(number))
    assert found is None or (found == number).all()
    store.put(str(number), np.full((256, 8), number, np.float32))
"""
    command = [sys.executable, "-W", "error", "-c", code, str(tmp_path)]
    running = [subprocess.Popen([*command, str(seed)], stderr=subprocess.PIPE, text=True) for seed in range(4)]
    for process in running:
        with process:
            assert process.communicate(timeout=120)[1] == ""
            assert process.returncode == 0
    assert sum(path.stat().st_size for path in tmp_path.iterdir()) <= 40_000


def test_threads_that_want_the_same_picture_encode_it_once(golden_bundle):
    factory = Counted()
    engine = load(golden_bundle, threads=1, session_factory=factory)
    factory.gate.clear()
    with ThreadPoolExecutor(4) as pool:
        orders = [(1, 2), (2, 1), (1, 2), (2,)]
        asked = [pool.submit(engine._vision.encode, [slice_picture(noise(n), engine.bundle.manifest.image) for n in order])
                 for order in orders]  # fmt: skip
        threading.Timer(0.3, factory.gate.set).start()
        encoded = [future.result(60) for future in asked]
    assert len(factory.runs) == 4  # tower and resampler, two pictures
    pictures = {1: encoded[0][0], 2: encoded[0][1]}
    for order, found in zip(orders, encoded, strict=True):
        for number, picture in zip(order, found, strict=True):
            assert picture.embeds is pictures[number].embeds


def waiting(cache, key):
    """Wait until somebody has claimed the key."""
    for _ in range(600):
        if key in cache._claimed:
            return
        threading.Event().wait(0.05)
    raise AssertionError


def test_a_thread_that_gives_up_leaves_the_picture_to_those_who_wait(golden_bundle):
    factory = Counted()
    engine = load(golden_bundle, threads=1, session_factory=factory)
    sliced = slice_picture(noise(1), engine.bundle.manifest.image)
    key = engine._vision._key(sliced, 0)
    factory.gate.clear()
    factory.failures = 1
    with ThreadPoolExecutor(2) as pool:
        first = pool.submit(engine._vision.encode, [sliced])
        waiting(engine._vision.cache, key)
        second = pool.submit(engine._vision.encode, [sliced])
        factory.gate.set()
        with pytest.raises(RunError, match="vision_encoder: some operator failed"):
            first.result(60)
        assert len(second.result(60)[0].embeds) == 64
    assert not engine._vision.cache._claimed


def test_progress_is_told_and_ends_the_request(golden_bundle):
    engine = load(golden_bundle, threads=1)
    sliced = [slice_picture(noise(n, size), engine.bundle.manifest.image) for n, size in ((1, (300, 200)), (2, (900, 900)))]
    told = []
    engine._vision.encode(sliced, progress=lambda *event: told.append(event))
    count = sum(len(picture.slices) for picture in sliced)
    assert [event for event in told if event[0] == "slices"] == [("slices", i, count) for i in range(count + 1)]
    assert [event for event in told if event[0] == "pictures"] == [("pictures", 1, 2), ("pictures", 2, 2)]
    told.clear()
    engine._vision.encode(sliced, progress=lambda *event: told.append(event))
    assert told == [("pictures", 1, 2), ("pictures", 2, 2)]

    class Enough(Exception):  # noqa: N818
        pass

    def stop(stage, done, total):
        if done == 2:
            raise Enough

    fresh = [slice_picture(noise(9, (900, 900)), engine.bundle.manifest.image)]
    with pytest.raises(Enough):
        engine._vision.encode(fresh, progress=stop)
    assert not engine._vision.cache._claimed
    assert len(engine._vision.encode(fresh)[0].embeds) == 64 * len(fresh[0].slices)


def test_who_waits_for_another_thread_may_stop_too(golden_bundle):
    factory = Counted()
    engine = load(golden_bundle, threads=1, session_factory=factory)
    sliced = slice_picture(noise(1), engine.bundle.manifest.image)

    def stop(stage, done, total):
        raise KeyError(stage)

    factory.gate.clear()
    with ThreadPoolExecutor(1) as pool:
        first = pool.submit(engine._vision.encode, [sliced])
        waiting(engine._vision.cache, engine._vision._key(sliced, 0))
        with pytest.raises(KeyError):
            engine._vision.encode([sliced], progress=stop)
        factory.gate.set()
        assert len(first.result(60)[0].embeds) == 64


def test_an_encoder_without_a_cache_keeps_nothing(golden_engine):
    encoder = VisionEncoder(golden_engine._vision._tower._sessions, golden_engine.bundle.manifest)
    sliced = slice_picture(noise(1), golden_engine.bundle.manifest.image)
    one, other = encoder.encode([sliced])[0], encoder.encode([sliced])[0]
    assert one.embeds is not other.embeds
    np.testing.assert_allclose(one.embeds, other.embeds, rtol=0, atol=1e-5)
