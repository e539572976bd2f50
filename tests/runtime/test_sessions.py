"""How sessions are opened, shared, taken in turns and closed, and what their failures become."""

import sys
import weakref
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import onnxruntime as ort
import pytest
from PIL import Image

from mcv_runtime import McvError, OptionError, Options, Request, ResourceError, RunError, load
from mcv_runtime.command.cli import main
from mcv_runtime.sessions.graphs import GuardedSession, cpu_session, session_options
from mcv_runtime.sessions.providers import provider_session

DEMO = Path(__file__).parents[2] / "models" / "tiny" / "demo.png"


def noise(seed, size=(300, 200)):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8))


class Watched:
    """A session factory that knows which of its sessions are still alive."""

    def __init__(self):
        self.opened, self.alive = [], weakref.WeakKeyDictionary()

    def __call__(self, path, options):
        session = cpu_session(path, options)
        self.opened.append(path.stem)
        self.alive[session] = path.stem.startswith("decoder")
        assert len(set(self.alive.values())) == 1, "tower and decoder are open together"
        return session


@pytest.fixture
def small(bundle_of):
    return bundle_of("minicpmv4_6")


@pytest.fixture
def watched():
    return Watched()


def test_low_memory_answers_alike_with_one_side_open(small, engine_of, watched):
    engine = load(small, threads=2, low_memory=True, session_factory=watched)
    assert watched.opened == []
    usual = engine_of("minicpmv4_6")
    for number, mode in ((1, "16x"), (2, "16x"), (2, "4x")):
        asked = {"max_new_tokens": 6, "downsample_mode": mode}
        assert engine.ask(noise(number), "What?", **asked).tokens == usual.ask(noise(number), "What?", **asked).tokens
    turn = ["vision_encoder", "merger", "decoder_with_past"]
    assert watched.opened == [*turn, *turn, "vision_encoder_4x", *turn[1:]]
    engine.ask(noise(2), "What?", max_new_tokens=2, downsample_mode="4x")  # a known picture
    assert len(watched.opened) == 9


def test_the_tower_may_wait_for_the_first_picture(small, engine_of, monkeypatch):
    opened = []

    def noted(path, options):
        opened.append(path.stem)
        return cpu_session(path, options)

    engine, usual = load(small, threads=2, open_vision=False, session_factory=noted), engine_of("minicpmv4_6")
    for picture, expected in ((None, ["decoder_with_past"]), (noise(1), ["decoder_with_past", "vision_encoder", "merger"])):
        assert engine.ask(picture, "What?", max_new_tokens=4).tokens == usual.ask(picture, "What?", max_new_tokens=4).tokens
        assert opened == expected
    said = []
    monkeypatch.setattr("mcv_runtime.command.cli.load", lambda *_, open_vision, **__: said.append(open_vision) or engine)
    for pictures in ([], ["--image", str(DEMO)]):
        monkeypatch.setattr(sys, "argv", ["mcv-run", "-p", "What?", "-n", "1", *pictures])
        with pytest.raises(SystemExit) as ended:
            main()
        assert ended.value.code == 0
    assert said == [False, True]


@pytest.mark.waits
def test_a_stream_goes_on_after_another_request_has_closed_its_decoder(small, engine_of, watched):
    engine = load(small, threads=1, low_memory=True, session_factory=watched)
    stream = engine.stream(noise(1), "What?", max_new_tokens=12)
    text = next(stream)
    engine.ask(noise(2), "What?", max_new_tokens=3)
    assert text + "".join(stream) == engine_of("minicpmv4_6").ask(noise(1), "What?", max_new_tokens=12).text


@pytest.mark.waits
def test_threads_share_a_low_memory_engine(small, engine_of, watched):
    engine = load(small, threads=1, low_memory=True, session_factory=watched)
    usual = engine_of("minicpmv4_6")
    with ThreadPoolExecutor(4) as pool:
        asked = [pool.submit(engine.ask, noise(n), "What?", max_new_tokens=5) for n in range(4)]
        found = [future.result().tokens for future in asked]
    assert found == [usual.ask(noise(n), "What?", max_new_tokens=5).tokens for n in range(4)]


def test_requests_for_the_other_side_wait_their_turn(small, engine_of, watched):
    """Pictures of all that have begun are encoded before anything is decoded: sides change once, not with every request."""
    engine = load(small, threads=1, low_memory=True, session_factory=watched)
    requests = [Request(noise(n) if n % 2 else None, "What?", options=Options(max_new_tokens=4)) for n in range(6)]
    found = [answer.tokens for answer in engine.batch(requests)]
    assert found == [engine_of("minicpmv4_6").ask(one.images, "What?", max_new_tokens=4).tokens for one in requests]
    assert watched.opened == ["vision_encoder", "merger", "decoder_with_past"]


def test_a_graph_that_fails_to_open_leaves_the_others_usable(small, engine_of):
    failing = [True]

    def factory(path, options):
        if failing and path.name.startswith("decoder"):
            raise RuntimeError("disk is gone")
        return cpu_session(path, options)

    engine = load(small, threads=1, low_memory=True, session_factory=factory)
    for _ in range(2):
        with pytest.raises(McvError, match=r"decoder_with_past\S* cannot be opened: disk is gone"):
            engine.ask(noise(1), "What?", max_new_tokens=2)
    failing.clear()
    expected = engine_of("minicpmv4_6").ask(noise(1), "What?", max_new_tokens=2).tokens
    assert engine.ask(noise(1), "What?", max_new_tokens=2).tokens == expected


@pytest.mark.parametrize(
    ("failure", "error", "builtin"),
    [
        (MemoryError(), ResourceError, MemoryError),
        (RuntimeError("bfc_arena.cc:376 Failed to allocate memory for requested buffer"), ResourceError, MemoryError),
        (RuntimeError("std::bad_alloc"), ResourceError, MemoryError),
        (RuntimeError("Non-zero status code returned\nwhile running MatMul"), RunError, RuntimeError),
        (RuntimeError("Invalid input name: " + "\x1b" * 1_000_000), RunError, RuntimeError),
        (OptionError("ours already"), OptionError, ValueError),
    ],
)  # fmt: skip
def test_what_a_run_raises_is_ours(failure, error, builtin):
    class Session:
        def run(self, outputs, feed):
            raise failure

        def run_with_iobinding(self, binding):
            raise failure

    session = GuardedSession(Session(), "resampler")
    for run in (lambda: session.run(None, {}), lambda: session.run_with_iobinding(None)):
        with pytest.raises(error) as caught:
            run()
        assert isinstance(caught.value, builtin)
        assert str(caught.value).isprintable()
        assert len(str(caught.value)) < 2000


def test_onnxruntime_out_of_memory_is_recognised(tmp_path):
    """The real thing: a tensor larger than any machine's address space."""
    onnx = pytest.importorskip("onnx")
    helper = onnx.helper
    graph = helper.make_graph(
        [helper.make_node("Expand", ["x", "shape"], ["y"])],
        "huge",
        [helper.make_tensor_value_info("x", 1, [1]), helper.make_tensor_value_info("shape", 7, [1])],
        [helper.make_tensor_value_info("y", 1, ["n"])],
    )
    path = tmp_path / "huge.onnx"
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), path)
    session = GuardedSession(cpu_session(path, session_options(1)), "vision_encoder")
    with pytest.raises(ResourceError, match="not enough memory to run vision_encoder"):
        session.run(None, {"x": np.ones(1, np.float32), "shape": np.array([1 << 50])})
    (found,) = session.run(None, {"x": np.ones(1, np.float32), "shape": np.array([3])})
    assert found.tolist() == [1, 1, 1]


def test_providers(golden_bundle):
    assert provider_session("CPU") is cpu_session
    with pytest.raises(OptionError, match="leave one of them out"):
        load(golden_bundle, provider="cuda", session_factory=cpu_session)
    for name, reason in (
        ("cuda", "which the installed onnxruntime does not have"),
        ("abacus", "which ONNX Runtime does not know"),
    ):
        if f"{name}ExecutionProvider".lower() in map(str.lower, ort.get_available_providers()):
            continue
        with pytest.raises(OptionError, match=rf"provider='{name}', {reason}; it has (\w+, )*cpu"):
            load(golden_bundle, provider=name)


def test_a_provider_that_does_not_start_is_told(monkeypatch, golden_bundle):
    """ONNX Runtime itself would go on with the CPU."""
    monkeypatch.setattr(ort, "get_available_providers", lambda: ["CUDAExecutionProvider", "CPUExecutionProvider"])
    with pytest.warns(UserWarning, match="CUDAExecutionProvider"), pytest.raises(OptionError, match="does not start here"):
        load(golden_bundle, provider="cuda")


def test_a_provider_gets_the_graphs_with_the_cpu_behind_it(monkeypatch, golden_bundle):
    asked = []

    class Session(ort.InferenceSession):
        def __init__(self, path, options, providers):
            asked.append(providers)
            super().__init__(path, options, providers=["CPUExecutionProvider"])

        def get_providers(self):
            return asked[-1]

    monkeypatch.setattr(ort, "InferenceSession", Session)
    monkeypatch.setattr(ort, "get_available_providers", lambda: ["XnnpackExecutionProvider", "CPUExecutionProvider"])
    assert load(golden_bundle, provider="xnnpack").ask(None, "Hello", max_new_tokens=2).tokens
    assert asked == [["XnnpackExecutionProvider", "CPUExecutionProvider"]] * 3


def test_threads_and_options_exclude_each_other(golden_bundle):
    with pytest.raises(OptionError, match="threads and session_options exclude each other"):
        load(golden_bundle, threads=1, session_options=session_options(2))


def test_idle_threads_sleep():
    options = session_options(2)
    assert options.get_session_config_entry("session.force_spinning_stop") == "1"
    assert options.intra_op_num_threads == 2
