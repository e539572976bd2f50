"""Pictures encoded by OpenVINO: the same numbers as by ONNX Runtime, and clear words where it cannot."""

import sys
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from PIL import Image

from mcv_runtime import OptionError, load
from mcv_runtime.sessions.graphs import cpu_session, session_options
from mcv_runtime.sessions.openvino_towers import openvino_session
from mcv_runtime.sessions.providers import provider_session, tower_session


def test_without_the_package_it_is_told(monkeypatch):
    monkeypatch.setitem(sys.modules, "openvino", None)
    with pytest.raises(OptionError, match=r"provider='openvino' needs the package openvino; run `pip install 'minicpmv-onnx\["):
        load(provider="openvino")


@pytest.fixture
def openvino():
    return pytest.importorskip("openvino", reason="`pip install openvino` to test with it")


def test_the_decoder_stays_with_onnx_runtime(openvino):
    assert provider_session("openvino") is cpu_session
    assert tower_session(" OpenVINO ") is not cpu_session
    assert tower_session("cpu") is cpu_session


@pytest.mark.parametrize("family", ["minicpmv2_6", "minicpmv4_6"])
def test_pictures_and_answers_are_those_of_onnx_runtime(openvino, bundle_of, engine_of, family):
    """Within 1e-4 of the largest value, as the towers are held to the published code."""
    pictures = [
        Image.fromarray(np.random.default_rng(0).integers(0, 256, size, np.uint8)) for size in ((300, 900, 3), (64, 80, 3))
    ]
    with load(bundle_of(family), threads=2, provider="openvino", tuned=False) as engine:
        assert engine.info().provider == "openvino"
        for picture in pictures:
            expected = engine_of(family).encode_image(picture)
            found = engine.encode_image(picture)
            scale = np.abs(expected.embeds).max()
            np.testing.assert_allclose(found.embeds, expected.embeds, rtol=0, atol=1e-4 * scale)
            answers = [one.ask(picture, "What is this?", max_new_tokens=4).tokens for one in (engine, engine_of(family))]
            assert answers[0] == answers[1]


@pytest.mark.waits
def test_threads_share_a_session(openvino, bundle_of):
    path = next((bundle_of("minicpmv2_6") / "onnx").glob("resampler*.onnx"))
    sessions = [factory(path, session_options(1)) for factory in (cpu_session, openvino_session("openvino"))]
    rng = np.random.default_rng(0)
    width = {given.name: given.shape for given in sessions[0].get_inputs()}["vision_hidden"][-1]
    feeds = [
        {
            "vision_hidden": rng.standard_normal((1, 12, width), np.float32),
            "patch_positions": np.stack(np.divmod(np.arange(12), 4), 1).astype(np.int64),
        }
        for _ in range(8)
    ]
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda feed: sessions[1].run(None, feed)[0], feeds))
    for feed, values in zip(feeds, found, strict=True):
        expected = sessions[0].run(None, feed)[0]
        np.testing.assert_allclose(values, expected, rtol=0, atol=1e-4 * np.abs(expected).max())


def test_bf16_where_the_processor_has_it(openvino):
    if "BF16" in openvino.Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES"):
        assert tower_session("openvino-bf16")
    else:
        with pytest.raises(OptionError, match="does not compute in bf16; provider='openvino' works"):
            tower_session("openvino-bf16")


def test_a_graph_that_it_does_not_read_is_told(openvino, tmp_path):
    onnx = pytest.importorskip("onnx")
    node = onnx.helper.make_node("Unheard", ["x"], ["y"], domain="com.example")
    x, y = (onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, [1]) for name in "xy")
    graph = onnx.helper.make_graph([node], "g", [x], [y])
    path = tmp_path / "tower.onnx"
    onnx.save(onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("com.example", 1)]), path)
    with pytest.raises(OptionError, match=r"OpenVINO does not run tower\.onnx: .*Unheard.*; leave provider out"):
        openvino_session("openvino")(path, session_options(1))
