"""Train the tiny model, one stage per call, on pictures drawn as it goes; see README.md for the sequence.

python models/tiny/train.py see --minutes 9
python models/tiny/train.py relate --minutes 30 --rate 0.5 --decay
"""

from __future__ import annotations

import argparse
import signal
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from batches import IGNORE, LABEL_SIZES, Batch, Encoder, Stream, tiny_image_spec
from model import TinyModel
from torch import Tensor, nn

FOLDER = Path(__file__).parent
STATE = FOLDER / ".train" / "state.pt"


STAGES: dict[str, dict[str, float]] = {
    "see": {"page": 50, "one_text": 8, "two_lines": 10, "several_shapes": 20, "shape_and_text": 12},
    "answer": {
        "page": 15, "one_text": 30, "two_lines": 14, "one_shape": 8, "several_shapes": 16, "shape_and_text": 14,
        "two_texts": 4, "text_or_shape": 3, "two_shapes": 5, "sliced": 3,
    },
    "finish": {
        "page": 45, "one_text": 18, "two_lines": 17, "one_shape": 2, "several_shapes": 24, "shape_and_text": 12,
        "two_texts": 4, "text_or_shape": 1.5, "two_shapes": 16, "sliced": 9, "enlarged": 4,
    },
    "relate": {
        "page": 28, "one_text": 12, "two_lines": 12, "one_shape": 1, "several_shapes": 48, "shape_and_text": 8,
        "two_texts": 2, "text_or_shape": 1, "two_shapes": 22, "sliced": 8, "enlarged": 3,
    },
}  # fmt: skip
"""What each stage shows: weights of the makers of scenes. Pages are for the dense labels alone, and in `see` all scenes are."""


def dense_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Mean of the cross entropies of the dense labels: logits [N, sum(LABEL_SIZES)], labels [N, labels].

    Places with and without a label count equally: most of a picture is empty, which would drown the glyphs.
    """
    loss = logits.new_zeros(())
    for part, label in zip(torch.split(logits, LABEL_SIZES, dim=-1), labels.unbind(-1), strict=True):
        each = F.cross_entropy(part, label, ignore_index=IGNORE, reduction="none")
        for chosen, weight in ((label > 0, 0.7), (label == 0, 0.3)):
            loss = loss + weight * (each * chosen).sum() / chosen.sum().clamp(min=1)
    return loss / len(LABEL_SIZES)


def optimizers(model: TinyModel) -> list[torch.optim.Optimizer]:
    """Muon for the matrices inside tower and decoder (AdamW needed 1.5 times the samples at first), AdamW for the rest."""
    hidden = [p for part in (model.tower.layers, model.decoder.layers) for p in part.parameters() if p.ndim == 2]
    chosen = {id(p) for p in hidden}
    rest = [p for p in model.parameters() if id(p) not in chosen]
    return [
        torch.optim.Muon(hidden, lr=2e-3, weight_decay=0.01, momentum=0.95, ns_steps=4, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(rest, lr=1e-3, weight_decay=0.01, betas=(0.9, 0.98), fused=True),
    ]


def attention_in_float32() -> None:
    """Let attention alone compute in float32.

    On a CPU torch's bfloat16 attention is five times slower than in float32, while its matrix products are four times faster.
    """
    attention = F.scaled_dot_product_attention

    def widened(query: Tensor, key: Tensor, value: Tensor, **options: Any) -> Tensor:
        return attention(query.float(), key.float(), value.float(), **options).to(value.dtype)

    F.scaled_dot_product_attention = widened  # type: ignore[assignment]


@dataclass(slots=True)
class Progress:
    """Running means for the log."""

    sums: dict[str, float] = field(default_factory=dict)
    counts: dict[str, int] = field(default_factory=dict)

    def add(self, name: str, value: float) -> None:
        self.sums[name] = self.sums.get(name, 0.0) + value
        self.counts[name] = self.counts.get(name, 0) + 1

    def flush(self) -> str:
        line = " ".join(f"{name} {total / self.counts[name]:.4f}" for name, total in self.sums.items())
        self.sums.clear()
        self.counts.clear()
        return line


def flat(parts: list[Tensor]) -> Tensor:
    return torch.cat([part.flatten(0, 1) for part in parts])


def losses(model: TinyModel, batch: Batch, progress: Progress) -> Tensor:
    """The loss of one batch; notes its parts."""
    patches, visual = model.see(batch)
    seen = model.patch_head(flat(patches).float()), model.query_head(flat(visual).float())
    labels = flat(batch.patch_labels), flat(batch.query_labels)
    dense = [dense_loss(logits, label) for logits, label in zip(seen, labels, strict=True)]
    loss = dense[0] + dense[1]
    progress.add("patch", dense[0].item())
    progress.add("query", dense[1].item())
    for name, logits, label in zip(("patch", "query"), seen, labels, strict=True):
        glyphs = label[:, 0] > 0
        if glyphs.any():
            right = logits[glyphs, : LABEL_SIZES[0]].argmax(-1) == label[glyphs, 0]
            progress.add(f"{name}_glyph", right.float().mean().item())
    if not batch.answered:
        return loss
    logits = model.answer_logits(batch, visual).float()
    answer = F.cross_entropy(logits, batch.targets, ignore_index=IGNORE)
    right = (logits.argmax(-1) == batch.targets)[batch.targets != IGNORE]
    progress.add(f"answer{len(batch.pixels)}", answer.item())
    progress.add(f"token{len(batch.pixels)}", right.float().mean().item())
    return loss + answer


def save(model: nn.Module, optimizers: list[torch.optim.Optimizer], samples: int) -> None:
    STATE.parent.mkdir(exist_ok=True)
    content = {"model": model.state_dict(), "optimizers": [o.state_dict() for o in optimizers], "samples": samples}
    torch.save(content, STATE.with_suffix(".new"))
    STATE.with_suffix(".new").replace(STATE)


def train(name: str, minutes: float, decay: bool, rate: float) -> None:
    mixture = STAGES[name]
    encoder = Encoder(FOLDER / "checkpoint", tiny_image_spec())
    torch.manual_seed(0)
    model = TinyModel(encoder.vocab_size, torch.bfloat16)
    rules = optimizers(model)
    peaks = [rule.param_groups[0]["lr"] * rate for rule in rules]
    samples = 0
    if STATE.exists():
        state = torch.load(STATE, weights_only=True)
        model.load_state_dict(state["model"])
        for rule, saved in zip(rules, state["optimizers"], strict=True):
            rule.load_state_dict(saved)
        samples = state["samples"]
    attention_in_float32()
    stream = Stream(encoder, mixture, f"{name} {samples}", unanswered=mixture if name == "see" else ["page"])
    batches = torch.utils.data.DataLoader(stream, batch_size=None, num_workers=1, prefetch_factor=16)
    parameters = list(model.parameters())
    asked_to_stop: list[int] = []
    signal.signal(signal.SIGTERM, lambda number, _: asked_to_stop.append(number))
    progress, started = Progress(), time.monotonic()
    for step, batch in enumerate(batches, 1):
        elapsed = (time.monotonic() - started) / 60
        if elapsed > minutes or asked_to_stop:
            break
        left = max(0.01, 1 - elapsed / minutes) if decay else 1.0
        for rule, peak in zip(rules, peaks, strict=True):
            rule.param_groups[0]["lr"] = peak * min(left, step / 150)
        torch.autograd.backward(losses(model, batch, progress))
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        for rule in rules:
            rule.step()
            rule.zero_grad()
        samples += len(batch.input_ids)
        if step % 100 == 0:
            print(f"{name} {elapsed:.1f} min {samples} samples {progress.flush()}", flush=True)
        if step % 250 == 0:
            save(model, rules, samples)
    save(model, rules, samples)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("stage", choices=STAGES)
    parser.add_argument("--minutes", type=float, required=True, help="how long to train")
    parser.add_argument("--decay", action="store_true", help="let the learning rate fall to nothing over the stage")
    parser.add_argument("--rate", type=float, default=1.0, help="factor on the learning rates")
    options = parser.parse_args()
    train(options.stage, options.minutes, options.decay, options.rate)


if __name__ == "__main__":
    main()
