"""Bundles against a reference: nothing where nothing differs, and the culprit where one layer is damaged."""

import json
import re
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest

from mcv_calibration.accuracy import check_same_model
from mcv_calibration.contender import Contender
from mcv_calibration.continuation import continuation_feed, greedy_answer
from mcv_calibration.gate import Gate
from mcv_calibration.layer_errors import layer_errors
from mcv_calibration.report import Report, make_report
from mcv_calibration.report_html import pieces, render
from mcv_calibration.samples import Sample, SampleSet
from mcv_calibration.taps import TappedGraph
from mcv_runtime.bundle.folder import Bundle
from mcv_runtime.errors import GateError, OptionError


@pytest.fixture(scope="module")
def compared(bundle_of: Callable[..., Path], few_samples: tuple[Sample, ...]) -> Report:
    """fp32 against itself, and q8."""
    reference, same, q8 = (
        Contender(bundle_of("minicpmv2_6", precision), name=name, threads=1)
        for name, precision in (("fp32", "fp32"), ("again", "fp32"), ("<q8>", "q8"))
    )
    samples = SampleSet(few_samples, ("broken.png: <not a picture>",), "a folder")
    return make_report(reference, [same, q8], samples, threads=1, max_new_tokens=24)


def test_fp32_against_itself_is_without_error(compared: Report) -> None:
    same = compared.bundles[0]
    assert same.accuracy is not None
    for error in (same.accuracy.vision, same.accuracy.compressor, same.accuracy.visual_tokens):
        assert error is not None
        assert (error.relative, error.sqnr_db, error.cosine_min) == (0, None, 1)
    for error in (same.accuracy.decoder, same.accuracy.pictures, same.accuracy.together):
        assert (error.kl_max, error.agreement) == (0, 1)
    assert same.same.hits == same.same.total == len(compared.samples) == 3
    assert same.accuracy.together.agreeing.interval.low < 0.95 < same.accuracy.together.agreeing.interval.high == 1
    assert {layer.relative for layer in same.layers} == {0}


def test_parts_are_told_apart(compared: Report) -> None:
    q8 = compared.bundles[1]
    accuracy = q8.accuracy
    assert accuracy is not None and accuracy.vision and accuracy.compressor and accuracy.visual_tokens
    # by the same arithmetic on other inputs, errors of independent parts add up in squares
    sum_of_squares = np.hypot(accuracy.vision.relative, accuracy.compressor.relative)
    assert 0.001 < accuracy.vision.relative < accuracy.visual_tokens.relative < 2 * sum_of_squares
    assert 0 < accuracy.pictures.kl_mean < accuracy.together.kl_mean
    assert 0 < accuracy.decoder.kl_mean < accuracy.together.kl_mean
    assert {layer.precision for layer in q8.layers if "layers." in layer.path} == {"q8"}
    assert {layer.graph for layer in q8.layers} == {"vision_encoder", "resampler", "decoder_with_past"}


def test_the_report_as_json(compared: Report) -> None:
    data = json.loads(compared.to_json())
    assert data["format"] == 1
    q8 = data["bundles"][1]
    assert q8["size"] > sum(graph["size"] for graph in q8["graphs"]) > 0
    assert q8["speed"]["vision_s"] > 0
    ratio = data["reference"]["speed"]["vision_s"] / q8["speed"]["vision_s"]
    assert q8["speedup"]["vision_s"] == pytest.approx(ratio)
    assert [answer["right"] for answer in q8["answers"]] == [None, False, None]


class Links(HTMLParser):
    """What a page would load or lead to."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found += [value or "" for name, value in attrs if name in ("src", "href", "srcset", "data", "action", "poster")]
        assert tag not in ("script", "link", "iframe", "object", "base")


def test_the_page_is_well_formed_and_needs_nothing_else(compared: Report, few_samples: tuple[Sample, ...]) -> None:
    answer = replace(compared.bundles[1].answers[0], text="a\0b</mark><script>alert('\ud800')</script>")
    evil = replace(compared.bundles[1], answers=(answer, *compared.bundles[1].answers[1:]))
    page = render(replace(compared, bundles=(compared.bundles[0], evil)), few_samples)
    page.encode("utf-8")
    ElementTree.fromstring(page.removeprefix("<!DOCTYPE html>"))
    links = Links()
    links.feed(page)
    assert len(links.found) == 3
    assert all(link.startswith("data:image/webp;base64,") for link in links.found)
    assert not re.search(r"https?:|//\w|@import|url\(", re.sub(r'src="data:[^"]*"', "", page))
    for escaped in ("What &lt;b&gt;differs&lt;/b&gt; &amp; why?", "&lt;q8&gt;", "&lt;not a picture&gt;"):
        assert escaped in page


def test_differing_words_are_marked() -> None:
    found = pieces("a red circle.", "a blue circle.")
    assert [(piece.text, piece.same) for piece in found] == [("a ", True), ("blue", False), (" circle.", True)]


@pytest.mark.parametrize(
    ("graph", "layer"),
    [("vision_encoder", "layers.1.fc1"), ("resampler", "v_proj"), ("decoder_with_past", "layers.1.o_proj")],
)
def test_a_damaged_layer_is_named_first(
    graph: str,
    layer: str,
    damage: Callable[[str, str], Path],
    bundle_of: Callable[..., Path],
    few_samples: tuple[Sample, ...],
) -> None:
    reference, damaged = (Contender(folder, threads=1) for folder in (bundle_of("minicpmv2_6"), damage(graph, layer)))
    samples = SampleSet(few_samples[:1], (), "a folder")
    (bundle,) = make_report(reference, [damaged], samples, threads=1, max_new_tokens=4).bundles
    with pytest.raises(GateError) as refusal:
        Gate(max_kl=1e-5).check(bundle)
    assert refusal.value.exit_code == 3
    assert f"the layers that cost most: {graph} {layer} (q8, +" in str(refusal.value)
    Gate(max_kl=1e5, min_agreement=0).check(bundle)
    with pytest.raises(GateError, match="below --min-agreement 1"):
        Gate(min_agreement=1).check(bundle)


@pytest.mark.parametrize("wrong", [{"max_kl": -1}, {"max_kl": float("nan")}, {"min_agreement": 90}])
def test_a_gate_that_makes_no_sense(wrong: dict[str, float]) -> None:
    with pytest.raises(OptionError, match="--m"):
        Gate(**wrong)


def test_bundles_of_different_models(bundle_of: Callable[..., Path]) -> None:
    one, other = (Contender(bundle_of(family), threads=1) for family in ("minicpmv2_6", "minicpmv4_6"))
    with pytest.raises(OptionError, match="different models"):
        check_same_model(one, other)


@pytest.mark.parametrize("family", ["minicpmv2_6", "minicpmv4_6"])
def test_scoring_a_text_at_once_is_decoding_it(family: str, bundle_of: Callable[..., Path], golden_root: Path) -> None:
    """The answer that the engine writes token by token is the likeliest at every place, and is found from a wrong guess."""
    contender = Contender(bundle_of(family), threads=1)
    picture = sorted((golden_root / "images").iterdir())[0]
    (encoded,), _ = contender.encode([picture])
    answer = contender.engine.ask([encoded], "What is it?", max_new_tokens=6)
    prompt = contender.engine.prompt([{"role": "user", "content": [encoded, "What is it?"]}])
    calls = 0

    def logits_after(tokens):
        nonlocal calls
        calls += 1
        return contender.run("decoder_with_past", continuation_feed(contender.manifest, prompt, encoded.embeds, tokens)).output

    generation = contender.manifest.generation
    assert greedy_answer(logits_after, answer.tokens, generation, 6) == answer.tokens
    assert calls == 1
    wrong = (*answer.tokens[:2], (answer.tokens[2] + 1) % 100)
    assert greedy_answer(logits_after, wrong, generation, 6) == answer.tokens
    assert contender.text(answer.tokens) == answer.text


def test_taps_in_passes_leave_the_bundle_alone(bundle_of: Callable[..., Path], few_samples: tuple[Sample, ...]) -> None:
    folders = bundle_of("minicpmv2_6"), bundle_of("minicpmv2_6", "q8")
    contender = Contender(folders[0], threads=1)
    _, calls = contender.encode(few_samples[0].images)
    feeds = [call.inputs for call in calls if call.graph == "vision_encoder"][:2]
    before = [sorted(folder.rglob("*")) for folder in folders]
    paths = [
        folder / "onnx" / name for folder, name in zip(folders, ("vision_encoder.onnx", "vision_encoder_q8.onnx"), strict=True)
    ]
    whole, cut = (layer_errors("vision_encoder", *map(TappedGraph, paths), feeds, max_bytes=limit) for limit in (10**9, 10**5))
    assert [layer.path for layer in whole] == [layer.path for layer in cut]
    assert [layer.relative for layer in whole] == pytest.approx([layer.relative for layer in cut], rel=1e-3)
    assert whole[0].path == "patch_embedding" and whole[-1].path == "layers.2.fc2"
    assert before == [sorted(folder.rglob("*")) for folder in folders]


@pytest.mark.parametrize("precision", ["int8-token", "int8-dynamic"])
def test_taps_are_behind_all_that_belongs_to_a_layer(
    precision: str, bundle_of: Callable[..., Path], few_samples: tuple[Sample, ...]
) -> None:
    """Behind the product with each row's magnitude and the bias, where those are nodes of their own."""
    graphs = [TappedGraph(Bundle.open(bundle_of("minicpmv2_6", one)).graph("vision_encoder")) for one in ("fp32", precision)]
    contender = Contender(bundle_of("minicpmv2_6"), threads=1)
    _, calls = contender.encode(few_samples[0].images)
    feeds = [call.inputs for call in calls if call.graph == "vision_encoder"][:1]
    layers = layer_errors("vision_encoder", *graphs, feeds)
    assert {layer.path: layer.relative for layer in layers if not layer.relative < 0.1} == {}
    assert {tap.precision for path, tap in graphs[1].taps.items() if path.startswith("layers.")} == {precision}


class Fixed:
    """A tapped graph that gives out the same result whatever comes in."""

    def __init__(self, width: int) -> None:
        self._width = width

    def run(self, paths, feeds):
        for _ in feeds:
            yield {path: np.ones((2, self._width), np.float32) for path in paths}


def test_a_pruned_layer_is_marked(bundle_of: Callable[..., Path], few_samples: tuple[Sample, ...]) -> None:
    contender = Contender(bundle_of("minicpmv2_6"), threads=1)
    _, calls = contender.encode(few_samples[0].images)
    feeds = [call.inputs for call in calls if call.graph == "resampler"][:1]
    errors = layer_errors("resampler", Fixed(3), TappedGraph(contender.engine.bundle.graph("resampler")), feeds)
    assert errors
    assert {(error.relative, error.sqnr_db, error.added) for error in errors} == {(None, None, None)}
