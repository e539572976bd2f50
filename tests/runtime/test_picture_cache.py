"""Pictures are encoded once: in memory, on disk, and when several threads ask at the same time."""

import hashlib
import json
import logging
import os
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import numpy as np
import pytest
from PIL import Image

from mcv_runtime import Bundle, Options, OutputError, Request, RunError, load
from mcv_runtime.pictures.picture import slice_picture
from mcv_runtime.sessions.graphs import cpu_session
from mcv_runtime.vision.encoder import VisionEncoder
from mcv_runtime.vision.picture_cache import PictureCache, vision_identity
from mcv_runtime.vision.picture_store import PictureStore

KEY = "ab" * 32


class Counted:
    """A session factory whose sessions note every run, and may be told to fail or to wait at a `gate`."""

    def __init__(self):
        self.runs, self.failures = [], 0
        self.gate, self.arrived = threading.Event(), threading.Event()
        self.gate.set()

    @contextmanager
    def closed(self):
        """With the gate closed; open afterwards, whatever happened: nobody must wait for ever."""
        self.gate.clear()
        try:
            yield self.gate.set
        finally:
            self.gate.set()

    def __call__(self, path, options):
        session, name, mine = cpu_session(path, options), path.name, self

        class Session:
            def run(self, outputs, feed):
                mine.runs.append(name)
                mine.arrived.set()
                mine.gate.wait()
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
        assert cache.get(str(number)) is None
        cache.put(str(number), embeds(number))
    cache.get("0")
    cache.put("3", embeds(3))
    assert cache.get("1") is None
    assert [cache.get(key)[0, 0] for key in "023"] == [0, 2, 3]
    assert cache.nbytes == 3 * embeds(0).nbytes
    cache.put("4", embeds(4, rows=99))  # larger than the cache
    assert cache.nbytes == 3 * embeds(0).nbytes


def test_what_somebody_holds_is_known_though_nothing_is_kept():
    cache, held = PictureCache(0), embeds(1)
    cache.put("1", held)
    assert cache.get("1") is held
    del held
    assert cache.get("1") is None
    assert cache.nbytes == 0


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
    known = vision_identity(Bundle.open(copy), "cpu")
    assert known == vision_identity(Bundle.open(golden_bundle), "cpu")
    assert known != vision_identity(Bundle.open(bundle_of("minicpmv2_6", "q8")), "cpu")
    assert known != vision_identity(Bundle.open(golden_bundle), "openvino-bf16")
    assert known == vision_identity(Bundle.open(golden_bundle), "cpu")
    data = next(copy.glob("onnx/vision_encoder*.data"))
    data.write_bytes(data.read_bytes()[:-1] + b"x")
    manifest["files"][data.relative_to(copy).as_posix()]["sha256"] = hashlib.sha256(data.read_bytes()).hexdigest()
    (copy / "mcv.json").write_text(json.dumps(manifest))
    assert vision_identity(Bundle.open(copy), "cpu") != known


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


def test_the_least_recently_used_is_so_by_nanoseconds(tmp_path):
    """A float has 200 of them in a step, today."""
    room = PictureStore(tmp_path, 10_000)
    for number in range(3):
        room.put(str(number), embeds(number))
    each = (tmp_path / "0.mcvpicture").stat().st_size
    for number, last in enumerate([2, 0, 1]):
        os.utime(tmp_path / f"{number}.mcvpicture", ns=(0, 1_700_000_000_000_000_000 + last))
    PictureStore(tmp_path, 3 * each).put("3", embeds(3))
    assert sorted(path.name for path in tmp_path.iterdir()) == [f"{n}.mcvpicture" for n in (0, 2, 3)]


def test_a_folder_that_cannot_be_used(tmp_path, caplog):
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="cache folder"):
        PictureStore(tmp_path / "file" / "cache", 1000)
    store = PictureStore(tmp_path / "gone", 1000)
    (tmp_path / "gone").rmdir()
    store.put(KEY, embeds(1))
    assert store.get(KEY) is None
    assert len(caplog.records) == 1


@pytest.mark.waits
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
            assert process.communicate()[1] == ""
            assert process.returncode == 0
    assert sum(path.stat().st_size for path in tmp_path.iterdir()) <= 40_000


@pytest.mark.waits
def test_threads_that_want_the_same_picture_encode_it_once(golden_bundle):
    """The gate opens when all have handed their request in."""
    factory = Counted()
    engine = load(golden_bundle, threads=1, session_factory=factory)
    orders = [(1, 2), (2, 1), (1, 2), (2,)]
    with ThreadPoolExecutor(len(orders)) as pool, factory.closed() as open_gate:
        asked = [pool.submit(engine.ask, [noise(n) for n in order], "What?", max_new_tokens=1) for order in orders]
        factory.arrived.wait()
        while sum(engine._scheduler.load) < len(orders):
            threading.Event().wait(0.01)
        open_gate()
        encoded = [future.result().pictures for future in asked]
    assert len(factory.runs) == 4  # tower and resampler, two pictures
    pictures = {picture.fingerprint for order in encoded for picture in order}
    assert len(pictures) == 2


def test_a_request_that_fails_leaves_the_picture_to_those_who_wait(golden_bundle):
    factory = Counted()
    engine = load(golden_bundle, threads=1, session_factory=factory)
    factory.failures = 1
    first, second = (engine.submit(Request(noise(1), "What?", options=Options(max_new_tokens=2))) for _ in range(2))
    with pytest.raises(RunError, match="vision_encoder: some operator failed"):
        first.result()
    assert len(second.result().pictures[0].embeds) == 64


@pytest.mark.waits
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
    assert len(engine._vision.encode(fresh)[0].embeds) == 64 * len(fresh[0].slices)


def test_an_encoder_without_a_cache_keeps_nothing(golden_engine):
    encoder = VisionEncoder(golden_engine._vision._tower._sessions, golden_engine.bundle.manifest)
    sliced = slice_picture(noise(1), golden_engine.bundle.manifest.image)
    report = []
    for _ in range(2):
        encoder.encode([sliced], progress=lambda *event: report.append(event))
    assert report.count(("slices", 1, 1)) == 2
