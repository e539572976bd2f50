"""What each of several bundles costs against a reference, on the same samples and in the same run."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from hashlib import sha256
from typing import TYPE_CHECKING, Any

import numpy as np

from mcv_calibration.contender import INT8_CACHE, Call, Contender
from mcv_calibration.continuation import continuation_feed, greedy_answer
from mcv_calibration.distances import DistributionError, DistributionErrors, TensorError, TensorErrors
from mcv_calibration.samples import Sample
from mcv_runtime.bundle.manifest import GraphName, Manifest
from mcv_runtime.errors import OptionError
from mcv_runtime.pictures.picture import Picture
from mcv_runtime.text.prompts import Prompt

if TYPE_CHECKING:
    from numpy.typing import NDArray


MAX_NEW_TOKENS = 32
KEPT_CALLS, KEPT_TOKENS = 6, 256
"""Calls of each graph of the reference that are kept, to look into layers and blocks with: so many at least, and of the decoder
as many as give so many next tokens."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Speed:
    """In this run; `vision_s` is a slice's time in tower and compressor. None: not measured."""

    vision_s: float | None
    prefill_tokens_per_s: float | None
    decode_tokens_per_s: float | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Accuracy:
    """Errors of each graph alone, given what the reference's graphs before it made, and of the whole.

    `pictures` is the reference's decoder on the bundle's visual tokens: what tower and compressor cost the answer. None: no
    sample used the part.
    """

    vision: TensorError | None
    compressor: TensorError | None
    visual_tokens: TensorError | None
    """Of tower and compressor together."""
    decoder: DistributionError
    pictures: DistributionError
    together: DistributionError
    int8_cache: DistributionError | None
    """The same, of the graph that keeps keys and values in 8 bits. None: the bundle has none."""

    @property
    def served(self) -> tuple[DistributionError, ...]:
        """Of all that a bundle may answer with."""
        return (self.together,) if self.int8_cache is None else (self.together, self.int8_cache)


@dataclass(frozen=True, slots=True, kw_only=True)
class GivenAnswer:
    """A greedy answer, and whether it is the reference's and the right one (None: that is not known)."""

    text: str
    as_reference: bool
    right: bool | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    """One contender's part of a comparison; the reference itself has no accuracy."""

    accuracy: Accuracy | None
    speed: Speed | None
    answers: tuple[GivenAnswer, ...]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Comparison:
    """Results in the candidates' order; `calls` are some of the reference's, by graph, `samples` those that went through."""

    samples: tuple[Sample, ...]
    reference: Result
    candidates: tuple[Result, ...]
    calls: Mapping[GraphName, Sequence[Call]]


def compare(
    reference: Contender,
    candidates: Sequence[Contender],
    samples: Sequence[Sample],
    *,
    max_new_tokens: int = MAX_NEW_TOKENS,
    enough: int | None = None,
    advance: Callable[[int], None] = lambda done: None,
) -> Comparison:
    """Put every sample through all of them in turn, so that timings are of the same moments; `advance` gets the samples done.

    Distributions are compared along the reference's greedy answer; after `enough` of its tokens the other samples are left out.
    Raises `OptionError` for bundles of different models.
    """
    for candidate in candidates:
        check_same_model(reference, candidate)
    truth = _Tally(reference)
    tallies = [_Tally(candidate) for candidate in candidates]
    calls: dict[GraphName, list[Call]] = {}
    tokens, used = 0, 0
    for sample in samples:
        tokens += _score(sample, truth, tallies, calls, max_new_tokens)
        used += 1
        sufficient = enough is not None and tokens >= enough
        advance(len(samples) if sufficient else used)
        if sufficient:
            break
    return Comparison(
        samples=tuple(samples[:used]),
        reference=truth.result(),
        candidates=tuple(tally.result() for tally in tallies),
        calls=calls,
    )


def check_same_model(reference: Contender, candidate: Contender) -> None:
    """Raises `OptionError` unless both take the same inputs."""
    ours, theirs = reference.manifest, candidate.manifest
    if _facts(ours) != _facts(theirs):
        raise OptionError(
            f"{candidate.folder} and {reference.folder} are bundles of different models ({theirs.model} and {ours.model});"
            " compare bundles of one"
        )


def _facts(manifest: Manifest) -> list[object]:
    inputs = [graph.inputs for name, graph in manifest.graphs.items() if name != INT8_CACHE]  # one may have it, the other not
    return [manifest.family, manifest.hidden_size, manifest.image, manifest.text, manifest.placeholder, inputs]


@dataclass(slots=True, eq=False)
class _Tally:
    """What is added up for one contender."""

    contender: Contender
    vision: TensorErrors = field(default_factory=TensorErrors)
    compressor: TensorErrors = field(default_factory=TensorErrors)
    visual_tokens: TensorErrors = field(default_factory=TensorErrors)
    decoder: DistributionErrors = field(default_factory=DistributionErrors)
    pictures: DistributionErrors = field(default_factory=DistributionErrors)
    together: DistributionErrors = field(default_factory=DistributionErrors)
    int8_cache: DistributionErrors = field(default_factory=DistributionErrors)
    answers: list[GivenAnswer] = field(default_factory=list)
    slice_s: dict[GraphName, list[float]] = field(default_factory=dict)
    prefill_rates: list[float] = field(default_factory=list)
    decoded: int = 0
    decode_s: float = 0.0

    def saw(self, calls: Sequence[Call]) -> None:
        for call in calls:
            self.slice_s.setdefault(call.graph, []).append(call.seconds / len(call.output))

    def result(self) -> Result:
        return Result(
            accuracy=self._accuracy(), speed=self._speed() if self.contender.timed else None, answers=tuple(self.answers)
        )

    def _accuracy(self) -> Accuracy | None:
        decoder, pictures, together = self.decoder.result(), self.pictures.result(), self.together.result()
        if decoder is None or pictures is None or together is None:
            return None
        return Accuracy(
            vision=self.vision.result(),
            compressor=self.compressor.result(),
            visual_tokens=self.visual_tokens.result(),
            decoder=decoder,
            pictures=pictures,
            together=together,
            int8_cache=self.int8_cache.result(),
        )

    def _speed(self) -> Speed:
        return Speed(
            vision_s=sum(statistics.median(seconds) for seconds in self.slice_s.values()) if self.slice_s else None,
            prefill_tokens_per_s=statistics.median(self.prefill_rates) if self.prefill_rates else None,
            decode_tokens_per_s=self.decoded / self.decode_s if self.decode_s else None,
        )


def _score(
    sample: Sample, truth: _Tally, tallies: Sequence[_Tally], calls: dict[GraphName, list[Call]], max_new_tokens: int
) -> int:
    """Add one sample to all tallies; returns how many next tokens were compared."""
    reference = truth.contender
    pictures, seen = reference.encode(sample.images)
    truth.saw(seen)
    prompt = reference.engine.prompt([{"role": "user", "content": [*pictures, sample.prompt]}])
    embeds = _embeds([picture.embeds for picture in pictures], reference.manifest.hidden_size)
    encoded = [tally.contender.encode(sample.images) for tally in tallies]
    for tally, (_, own) in zip(tallies, encoded, strict=True):
        tally.saw(own)
        _score_graphs(tally, seen, own)
    asked = [_ask(tally, own, sample, max_new_tokens) for tally, (own, _) in zip(tallies, encoded, strict=True)]
    draft = asked[0][0] if asked else ()
    tokens, text = _reference_answer(truth, pictures, sample, prompt, embeds, draft, max_new_tokens)
    right = None if sample.answer is None else text == sample.answer
    truth.answers.append(GivenAnswer(text=text, as_reference=True, right=right))
    inputs = continuation_feed(reference.manifest, prompt, embeds, tokens)
    wanted = _decode(truth, inputs)
    for call in [*seen, wanted]:
        kept = calls.setdefault(call.graph, [])
        if len(kept) < KEPT_CALLS or (call is wanted and sum(len(one.output) for one in kept) < KEPT_TOKENS):
            kept.append(call)
    for tally, (own_pictures, _), (own_tokens, own_text) in zip(tallies, encoded, asked, strict=True):
        right = None if sample.answer is None else own_text == sample.answer
        tally.answers.append(GivenAnswer(text=own_text, as_reference=own_tokens == tokens, right=right))
        own_embeds = _embeds([picture.embeds for picture in own_pictures], tally.contender.manifest.hidden_size)
        if len(own_embeds):
            tally.visual_tokens.add(embeds, own_embeds)
        with_own = {**inputs, "vision_embeds": own_embeds}
        tally.decoder.add(wanted.output, _decode(tally, inputs).output)
        tally.together.add(wanted.output, tally.contender.run("decoder_with_past", with_own).output)
        tally.pictures.add(wanted.output, reference.run("decoder_with_past", with_own).output)
        if INT8_CACHE in tally.contender.manifest.graphs:
            tally.int8_cache.add(wanted.output, tally.contender.decode_in_int8(prompt, own_embeds, tokens))
    return len(tokens)


def _score_graphs(tally: _Tally, expected: Sequence[Call], found: Sequence[Call]) -> None:
    """Tower and compressor, each given the reference's inputs."""
    compressor = tally.contender.manifest.compressor
    for index, call in enumerate(expected):
        if call.graph == compressor:
            tally.compressor.add(call.output, tally.contender.run(call.graph, call.inputs).output)
            continue
        own = found[index] if index < len(found) else None
        if own is None or own.graph != call.graph or own.output.shape != call.output.shape:  # its slices were grouped otherwise
            own = tally.contender.run(call.graph, call.inputs)
        tally.vision.add(call.output, own.output)


def _ask(tally: _Tally, pictures: Sequence[Picture], sample: Sample, max_new_tokens: int) -> tuple[tuple[int, ...], str]:
    answer = tally.contender.engine.ask(list(pictures), sample.prompt, max_new_tokens=max_new_tokens)
    tally.decoded += len(answer.tokens) - 1
    tally.decode_s += answer.timings.decode
    return answer.tokens, answer.text


def _reference_answer(
    truth: _Tally,
    pictures: Sequence[Picture],
    sample: Sample,
    prompt: Prompt,
    embeds: NDArray[np.float32],
    draft: Sequence[int],
    max_new_tokens: int,
) -> tuple[tuple[int, ...], str]:
    """From the engine, or where that would read all weights for each token, by guesses that start with a candidate's answer."""
    reference = truth.contender
    if reference.timed:
        return _ask(truth, pictures, sample, max_new_tokens)

    def logits_after(tokens: Sequence[int]) -> NDArray[np.float32]:
        output: NDArray[np.float32] = reference.run(
            "decoder_with_past", continuation_feed(reference.manifest, prompt, embeds, tokens)
        ).output
        return output

    key = sha256(prompt.ids.tobytes() + embeds.tobytes() + bytes(str(max_new_tokens), "ascii")).digest()
    if key not in reference.answers:
        reference.answers[key] = greedy_answer(logits_after, draft, reference.manifest.generation, max_new_tokens)
    tokens = reference.answers[key]
    return tokens, reference.text(tokens)


def _decode(tally: _Tally, inputs: Mapping[str, NDArray[Any]]) -> Call:
    call = tally.contender.run("decoder_with_past", inputs)
    tally.prefill_rates.append(inputs["input_ids"].size / call.seconds)
    return call


def _embeds(parts: Sequence[NDArray[np.float32]], width: int) -> NDArray[np.float32]:
    """Visual tokens of several pictures: [visual, width]."""
    return np.concatenate([np.empty((0, width), np.float32), *parts])
