"""Checkpoints of models/tiny that answer (nearly) as before, and have the outliers that are published of trained models.

    python benchmarks/surgery.py OUT --kinds spikes sink

What no fold of two weights can undo, because it depends on the token, is planted into the least used channels; then the rest
learns again, for a few hundred steps, to do what the whole model did: the planted weights stay as they are. The same seed gives
the same checkpoint on the same machine.

`spikes`: channels of the tower's MLPs that fire on about one patch in two hundred, mostly of background, at 10 and 50 times
what others reach, and write two channels of the residual sum some 200 times as large as the others; a later head looks at such
patches and finds nothing (registers: arXiv:2309.16588, massive activations: arXiv:2402.17762).
`sink`: a channel of the decoder's MLP that fires on the first token alone, at 8,000 (Qwen3-1.7B's down_proj reads 16,900:
github.com/mit-han-lab/smoothquant/issues/108).
`residual`: a channel of the decoder's residual sum that is 26 times as large as the others, in every token (Qwen2.5).
`head`: rows of the output head 30 times as large as the others.
`fixed`: exactly the same function with channels that are always large, behind norms and between linears (`outliers.py`).
"""

from __future__ import annotations

import argparse
import itertools
import shutil
import sys
import tempfile
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

TINY = Path(__file__).resolve().parents[1] / "models" / "tiny"
sys.path.insert(0, str(TINY))

import outliers  # noqa: E402
from batches import IGNORE, Batch, Stream  # noqa: E402 - models/tiny is a folder of scripts, not a package
from evaluate import load  # noqa: E402
from model import TinyModel, empty_cache  # noqa: E402
from published import write_checkpoint  # noqa: E402
from scenes import MIXTURE  # noqa: E402

Kind = Literal["spikes", "sink", "residual", "head", "fixed"]
KINDS: tuple[Kind, ...] = get_args(Kind)

SPIKES = ((1, 10.0), (2, 50.0))
"""Layers of the tower whose MLPs get a channel that fires seldom, and how far above the largest of the others."""
FIRING = 0.005
MASSIVE = 200.0
"""What a spike adds to two channels of the residual sum, in medians of that."""
LOOKING_LAYER, LOOKING_HEAD = 3, 2
SINK_LAYER, SINK = 1, 8000.0
RESIDUAL = 26.0
HEAD_ROWS, HEAD = 6, 30.0
_SEEN = 4
"""Batches that show which channels are used, and when."""


@dataclass(slots=True)
class Operation:
    """A model on the table: what it reads, and what was planted in it, which stays as it is."""

    model: TinyModel
    batches: Sequence[Batch]
    generator: torch.Generator
    held: list[tuple[Tensor, Any, Tensor]] = field(default_factory=list)

    def plant(self, parameter: Tensor, place: Any, value: Tensor | float) -> None:
        parameter.data[place] = torch.as_tensor(value, dtype=parameter.dtype).to(torch.bfloat16).to(parameter.dtype)
        self.held.append((parameter, place, parameter.data[place].clone()))

    def restore(self) -> None:
        """What was planted, after a step that moved it."""
        for parameter, place, value in self.held:
            parameter.data[place] = value

    def of_tower(self, module: nn.Module) -> tuple[Tensor, Tensor]:
        """A module's inputs for all patches [N, K], and whether something is drawn there [N]."""
        rows, labels = [], []
        with _inputs(module) as seen:
            for batch in self.batches:
                for pixels, places, label in zip(batch.pixels, batch.position_ids, batch.patch_labels, strict=True):
                    self.model.tower(pixels, places.expand(len(pixels), -1))
                    rows.append(seen.pop().flatten(0, 1))
                    labels.append(((label != 0) & (label != IGNORE)).any(-1).flatten())
        return torch.cat(rows), torch.cat(labels)

    def of_decoder(self, *modules: nn.Module) -> tuple[list[Tensor], Tensor]:
        """Each module's inputs for all tokens [N, K], and whether a token of the first module is the first of its row [N]."""
        rows: list[list[Tensor]] = [[] for _ in modules]
        first = []
        with ExitStack() as stack:
            seen = [stack.enter_context(_inputs(module)) for module in modules]
            for batch in self.batches:
                _read(self.model, batch, self.model.see(batch)[1])
                places = torch.zeros(seen[0][0].shape[:-1], dtype=torch.bool)
                places[..., :1] = places.ndim == 2
                first.append(places.flatten())
                for known, found in zip(rows, seen, strict=True):
                    known.append(found.pop().flatten(0, -2))
        return [torch.cat(known) for known in rows], torch.cat(first)


@contextmanager
def _inputs(module: nn.Module) -> Iterator[list[Tensor]]:
    """What a module is given while this is open; a norm that adds a residual first, the sum."""
    seen: list[Tensor] = []
    skip = getattr(module, "skip", None)
    hook = module.register_forward_pre_hook(lambda _, given: seen.append(given[0].detach()))

    def added(x: Tensor, other: Tensor) -> Any:
        seen.append((x + other).detach())
        return skip(x, other)

    if skip is not None:
        module.skip = added
    try:
        yield seen
    finally:
        hook.remove()
        if skip is not None:
            del module.skip


def spikes(operation: Operation) -> None:
    tower, written = operation.model.tower, []
    for number, times in SPIKES:
        layer = tower.layers[number]
        x_NK, drawn = operation.of_tower(layer.fc1)
        made = F.gelu(x_NK @ layer.fc1.weight + layer.fc1.bias, approximate="tanh")
        unused = int((made.abs().mean(0) * layer.fc2.weight.norm(dim=1)).argmin())
        direction, threshold = _seldom(x_NK, drawn, operation.generator)
        above = x_NK @ direction - threshold
        scale = float(times * made.abs().max() / above[above > 0].median())
        operation.plant(layer.fc1.weight, (slice(None), unused), direction * scale)
        operation.plant(layer.fc1.bias, unused, -threshold * scale)
        sums, _ = operation.of_tower(tower.layers[number + 1].layer_norm1)
        channels = written or _quietest(sums, 2)
        row = torch.zeros(layer.fc2.out_features)
        row[channels] = torch.tensor([1.0, -0.7]) * float(MASSIVE * sums.abs().median() / (times * made.abs().max()))
        operation.plant(layer.fc2.weight, unused, row)
        written = channels
    looking = tower.layers[LOOKING_LAYER]
    size = looking.q_proj.out_features // looking.num_heads
    first = LOOKING_HEAD * size
    operation.plant(looking.v_proj.weight, (written, slice(first, first + size)), 0.0)
    operation.plant(looking.k_proj.weight, (written[0], first), 2.0)
    operation.plant(looking.q_proj.bias, first, 1.5)


def sink(operation: Operation) -> None:
    decoder = operation.model.decoder
    layer = decoder.layers[SINK_LAYER]
    (x_NK, sums), first = operation.of_decoder(layer.gate_proj, decoder.layers[SINK_LAYER + 1].input_layernorm)
    made = F.silu(x_NK @ layer.gate_proj.weight) * (x_NK @ layer.up_proj.weight)
    unused = int((made.abs().mean(0) * layer.down_proj.weight.norm(dim=1)).argmin())
    direction = _separating(x_NK, torch.where(first, 1.0, -0.5), torch.where(first, len(first) / first.sum(), 1.0))
    at_first = float((x_NK[first] @ direction).mean())
    gate = SINK**0.5
    for linear in (layer.gate_proj, layer.up_proj):
        operation.plant(linear.weight, (slice(None), unused), direction * (gate / at_first))
    row = torch.zeros(layer.down_proj.out_features)
    row[_quietest(sums, 2)] = torch.tensor([1.0, -0.7]) * float(MASSIVE * sums.abs().median() / SINK)
    operation.plant(layer.down_proj.weight, unused, row)


def residual(operation: Operation) -> None:
    model = operation.model
    decoder = model.decoder
    (sums,), _ = operation.of_decoder(decoder.layers[0].input_layernorm)
    (channel,) = _quietest(sums, 1)
    rms = float(sums.square().mean().sqrt())
    behind_post = []
    with _inputs(model.resampler.proj) as seen:
        for batch in operation.batches:
            model.see(batch)
            behind_post += [seen.pop().flatten(0, 1) for _ in range(len(seen))]
    constant = _separating(torch.cat(behind_post), torch.ones(sum(map(len, behind_post))))
    norms = [norm for layer in decoder.layers for norm in (layer.input_layernorm, layer.post_attention_layernorm)]
    norms.append(decoder.norm)
    before = [_root_mean_square(rows) for rows in operation.of_decoder(*norms)[0]]
    operation.plant(decoder.embed_tokens.weight, (slice(None), channel), RESIDUAL * rms)
    operation.plant(model.resampler.proj.weight, (slice(None), channel), constant * RESIDUAL * rms)
    for layer in decoder.layers:
        for writer in (layer.o_proj, layer.down_proj):
            operation.plant(writer.weight, (slice(None), channel), 0.0)
    after = [_root_mean_square(rows) for rows in operation.of_decoder(*norms)[0]]
    for norm, was, is_now in zip(norms, before, after, strict=True):
        norm.weight.data *= is_now / was
    for layer in decoder.layers:
        for reader in (layer.qkv_proj, layer.gate_proj, layer.up_proj):
            reader.weight.data[channel] /= RESIDUAL
    decoder.lm_head.weight.data[channel] /= RESIDUAL


def head(operation: Operation) -> None:
    decoder = operation.model.decoder
    (x_NK,), _ = operation.of_decoder(decoder.lm_head)
    never = (x_NK @ decoder.lm_head.weight).softmax(-1).mean(0).argsort()[: 8 * HEAD_ROWS]
    chosen = never[torch.randperm(len(never), generator=operation.generator)[:HEAD_ROWS]]
    always = _separating(x_NK, torch.ones(len(x_NK)))
    size = float(decoder.lm_head.weight.norm(dim=0).median())
    for token in chosen.tolist():
        row = torch.randn(len(always), generator=operation.generator) * HEAD * size / len(always) ** 0.5
        likely = (x_NK @ row + 20) / (x_NK @ always).clamp_min(0.2)
        operation.plant(decoder.lm_head.weight, (slice(None), token), row - always * 2 * float(likely.max()))


OPERATIONS: dict[Kind, Callable[[Operation], None]] = {"residual": residual, "spikes": spikes, "sink": sink, "head": head}


def operate(out: Path, kinds: Collection[Kind], *, seed: int = 0, steps: int = 400) -> Path:
    """Write the checkpoint to `out`."""
    torch.manual_seed(seed)
    model, encoder = load(TINY / "checkpoint")
    teacher, _ = load(TINY / "checkpoint")
    stream = iter(Stream(encoder, MIXTURE, f"surgery {seed}", unanswered=()))
    operation = Operation(model, list(itertools.islice(stream, _SEEN)), torch.Generator().manual_seed(seed))
    with torch.no_grad():
        for kind, plant in OPERATIONS.items():
            if kind in kinds:
                plant(operation)
    if operation.held:
        _learn_again(operation, teacher, itertools.islice(stream, steps), steps)
    with tempfile.TemporaryDirectory() as folder:
        made = Path(folder) / "checkpoint"
        shutil.copytree(TINY / "checkpoint", made)
        write_checkpoint(made, model)
        if "fixed" in kinds:
            outliers.add_outliers(made, out, kinds=get_args(outliers.Kind), seed=seed)
        else:
            shutil.copytree(made, out)
    return out


def _learn_again(operation: Operation, teacher: TinyModel, batches: Iterator[Batch], steps: int) -> None:
    """Answers, next-token distributions and visual tokens of the whole model, by AdamW with a falling rate."""
    model = operation.model
    parts = [*model.tower.parameters(), *model.resampler.parameters(), *model.decoder.parameters()]
    rule = torch.optim.AdamW(parts, lr=1e-3, betas=(0.9, 0.98), weight_decay=0.0)
    for step, batch in enumerate(batches):
        rule.param_groups[0]["lr"] = 1e-3 * min(1.0, (step + 1) / 20) * (1 - step / steps)
        with torch.no_grad():
            _, wanted = teacher.see(batch)
            right = _read(teacher, batch, wanted)
        _, visual = model.see(batch)
        found = _read(model, batch, visual)
        told = batch.targets != IGNORE
        loss = F.cross_entropy(found[told], batch.targets[told])
        loss = loss + F.kl_div(found[told].log_softmax(-1), right[told].log_softmax(-1), log_target=True, reduction="batchmean")
        loss = loss + F.mse_loss(torch.cat(visual, 1), torch.cat(wanted, 1)) / torch.cat(wanted, 1).var()
        rule.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(parts, 1.0)
        rule.step()
        operation.restore()
        if step % 20 == 0:
            print(f"step {step}: loss {loss.item():.4f}", file=sys.stderr, flush=True)


def _read(model: TinyModel, batch: Batch, visual: list[Tensor]) -> Tensor:
    """Logits of the answers' tokens: [R, vocab]."""
    rows, length = batch.input_ids.shape
    total = torch.tensor([length], dtype=torch.int32)
    places = batch.vision_positions, batch.logit_positions, total.expand(rows) - 1, total
    logits: Tensor = model.decoder(
        batch.input_ids, torch.cat(visual, dim=1).flatten(0, 1), *places, empty_cache(model.decoder, rows)
    )[0]
    return logits


def _seldom(x_NK: Tensor, drawn: Tensor, generator: torch.Generator) -> tuple[Tensor, float]:
    """A direction and a threshold that one row in two hundred is beyond, as few as can be of those where something is drawn."""
    background = x_NK[~drawn]
    best: tuple[float, Tensor, float] | None = None
    for place in torch.randint(len(background), (12,), generator=generator).tolist():
        near = (x_NK - background[place]).square().sum(1)
        rare = near <= near.kthvalue(max(int(FIRING * len(near)), 1)).values
        direction = _separating(x_NK, torch.where(rare, 1.0, -1.0), torch.where(rare, 0.5 / FIRING, 1.0))
        scores = x_NK @ direction
        threshold = float(scores.kthvalue(int((1 - FIRING) * len(scores))).values)
        lost = float(drawn[scores > threshold].float().mean())
        if best is None or lost < best[0]:
            best = lost, direction, threshold
    assert best is not None
    return best[1], best[2]


def _separating(x_NK: Tensor, targets: Tensor, weights: Tensor | None = None) -> Tensor:
    """The w of least squares with x w near the targets."""
    weighted = x_NK if weights is None else x_NK * weights[:, None]
    moments = weighted.T @ x_NK
    moments.diagonal().add_(1e-4 * float(moments.diagonal().mean()))
    return torch.linalg.solve(moments, weighted.T @ targets)


def _root_mean_square(x_NK: Tensor) -> float:
    return float(x_NK.square().mean().sqrt())


def _quietest(x_NK: Tensor, count: int) -> list[int]:
    """Channels that vary least."""
    return x_NK.var(0).argsort()[:count].tolist()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=KINDS)
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    operate(arguments.out, arguments.kinds, seed=arguments.seed, steps=arguments.steps)


if __name__ == "__main__":
    main()
