"""An engine as a thing: what it says of itself, what it refuses, how it warms up and closes."""

from pathlib import Path

import pytest

from mcv_runtime import OptionError, Options, RunError, load
from mcv_runtime.vision.tower import Tower

DEMO = Path(__file__).parents[2] / "models" / "tiny" / "demo.png"
CAPTION, TEXT = "Describe the picture.", "What does the text say?"


@pytest.fixture
def engine():
    """The demonstration model, which knows nothing yet."""
    return load(threads=1)


def test_pictures_of_another_bundle_are_refused(bundle_of, engine_of):
    """Also where they are as wide."""
    picture = engine_of("minicpmv4_6").encode_image(DEMO)
    other = load(bundle_of("minicpmv4_6", "q8"))
    with pytest.raises(OptionError, match="encoded with another bundle"):
        other.ask(picture, "What?")
    for call in (
        lambda: other.chat(nonsense=1),
        lambda: other.encode_image(DEMO, temperature=3),
        lambda: other.encode_image(DEMO, options=Options(temperature=3.0)),
        lambda: other.stream(DEMO, "What?", max_tokens=3),
    ):
        with pytest.raises(OptionError, match="there is no option"):
            call()


def test_what_an_engine_says_of_itself(engine, engine_of):
    info = engine.info()
    assert (info.family, info.context_length, info.video, info.thinking, info.provider) == (
        "minicpmv2_6",
        4096,
        True,
        False,
        "cpu",
    )
    assert info.precisions["decoder_with_past"] == "q8"
    assert engine_of("minicpmv4_6").info().downsample_modes == ("16x", "4x")
    engine.ask(DEMO, TEXT)
    use = engine.memory()
    assert use.kept > 0 < use.pictures
    assert use.kept + use.pictures < use.limit


def test_warming_up_runs_every_graph_and_leaves_what_others_have(tmp_path, monkeypatch):
    runs = []
    encode = Tower.encode
    monkeypatch.setattr(Tower, "encode", lambda *args: runs.append(args) or encode(*args))
    with load(threads=1, cache_dir=tmp_path) as engine:
        engine.warm_up()
        assert len(runs) == 1
        assert not any(tmp_path.iterdir()) and engine.memory().pictures == 0
        engine.ask(DEMO, TEXT, max_new_tokens=2)
        pictures, stored = engine.memory().pictures, sorted(tmp_path.iterdir())
        read = len(runs)
        engine.warm_up()
        assert len(runs) == read + 1
        assert (engine.memory().pictures, sorted(tmp_path.iterdir())) == (pictures, stored)
        assert engine.ask(DEMO, TEXT, max_new_tokens=2).reused_tokens > 0
        assert len(runs) == read + 1


def test_closing_ends_what_is_under_way():
    with load(threads=1) as engine:
        stream = engine.stream(DEMO, CAPTION)
        next(stream)
    with pytest.raises(RunError, match="the engine was closed"):
        stream.result()
    with pytest.raises(RunError, match="the engine was closed"):
        engine.ask(DEMO, TEXT)
