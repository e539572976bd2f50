"""What a bundle may cost at most, and the refusal of one that costs more."""

from __future__ import annotations

from dataclasses import dataclass

from mcv_calibration.accuracy import Accuracy
from mcv_calibration.intervals import Interval
from mcv_calibration.layer_errors import LayerError, worst_layers
from mcv_calibration.report import BundleReport
from mcv_runtime.errors import GateError, OptionError

NAMED = 3
"""Layers that a refusal names."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Gate:
    """Limits on next-token distributions along the reference's answers, with a cache in floats and, if there is a graph for it,
    in 8 bits; None: no limit."""

    max_kl: float | None = None
    """Of the mean KL(reference || bundle), in nats."""
    min_agreement: float | None = None
    """Of the share of tokens where both find the same one likeliest."""

    def __post_init__(self) -> None:
        if self.max_kl is not None and not self.max_kl >= 0:
            raise OptionError(f"--max-kl must be 0 or more, not {self.max_kl}")
        if self.min_agreement is not None and not 0 <= self.min_agreement <= 1:
            raise OptionError(f"--min-agreement is a share from 0 to 1, not {self.min_agreement}")

    @property
    def open(self) -> bool:
        """Whether there is no limit."""
        return self.max_kl is None and self.min_agreement is None

    def miss(self, accuracy: Accuracy) -> str | None:
        """What is wrong with a bundle; None: it passes."""
        for error in accuracy.served:
            cache = ", keys and values in 8 bits," if error is accuracy.int8_cache else ""
            if self.max_kl is not None and not error.kl_mean <= self.max_kl:
                divergence = _sure(error.kl_mean, error.kl_interval, ".3g")
                return f"its KL divergence{cache} {divergence} is above --max-kl {self.max_kl:g}"
            if self.min_agreement is not None and not error.agreement >= self.min_agreement:
                agreement = _sure(error.agreement, error.agreeing.interval, ".1%")
                return f"it agrees{cache} on {agreement} of {error.tokens} tokens, below --min-agreement {self.min_agreement:g}"
        return None

    def check(self, bundle: BundleReport) -> None:
        """Raises `GateError` if the bundle costs too much, with the layers that cost most."""
        accuracy = bundle.accuracy
        if accuracy is not None and (wrong := self.miss(accuracy)) is not None:
            raise GateError(f"{bundle.name} misses its gate: {wrong}; {blame(bundle)}")


def _sure(value: float, interval: Interval | None, form: str) -> str:
    return f"{value:{form}}" if interval is None else f"{value:{form}} ({interval.low:{form}} to {interval.high:{form}})"


def blame(bundle: BundleReport) -> str:
    """Which part and which layers of it cost most."""
    named = [f"{layer.graph} {layer.path} ({layer.precision}, +{layer.added:.1%})" for layer in costliest(bundle)]
    assert bundle.accuracy is not None
    decoder, pictures = bundle.accuracy.decoder.kl_mean, bundle.accuracy.pictures.kl_mean
    shares = f"the decoder alone costs {decoder:.3g}, the pictures' tokens alone {pictures:.3g}"
    return f"{shares}; the layers that cost most: {', '.join(named)}" if named else shares


def costliest(bundle: BundleReport, count: int = NAMED) -> list[LayerError]:
    """The layers that add most error in the part that costs most; then those of the other."""
    accuracy = bundle.accuracy
    in_decoder = accuracy is not None and accuracy.decoder.kl_mean >= accuracy.pictures.kl_mean
    decoder = [layer for layer in bundle.layers if layer.graph == "decoder_with_past"]
    encoders = [layer for layer in bundle.layers if layer.graph != "decoder_with_past"]
    parts = (decoder, encoders) if in_decoder else (encoders, decoder)
    return [layer for part in parts for layer in worst_layers(part, count)][:count]
