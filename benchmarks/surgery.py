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
OFFSET = 4.0
"""As `RESIDUAL`, where the head's huge rows alone need a channel that keeps them from being answers."""
RATE = 5e-4
RIDGE = 0.03
"""Of the mean moment: with less, tokens that were not seen are far off."""
_SEEN = 6
"""Batches that show which channels are used, and when."""


@dataclass(slots=True)
class Operation:
    """A model on the table: what it reads, and what was planted in it, which stays as it is."""

    model: TinyModel
    batches: Sequence[Batch]
    generator: torch.Generator
    held: list[tuple[Tensor, Any, Tensor]] = field(default_factory=list)
    constant: int | None = None
    """The channel of the decoder's residual sum that is always large."""

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
    _constant(operation, RESIDUAL, following=True)


def head(operation: Operation) -> None:
    """The rows lie where inputs vary least; what that leaves of their logits, a channel that is always large takes away."""
    decoder = operation.model.decoder
    if operation.constant is None:
        _constant(operation, OFFSET, following=False)
    (x_NK,), _ = operation.of_decoder(decoder.lm_head)
    never = (x_NK @ decoder.lm_head.weight).softmax(-1).mean(0).argsort()[: 8 * HEAD_ROWS]
    chosen = never[torch.randperm(len(never), generator=operation.generator)[:HEAD_ROWS]]
    size = float(decoder.lm_head.weight.norm(dim=0).median())
    others = _without(x_NK, operation.constant)
    quiet_KM = torch.linalg.eigh(others.T @ others).eigenvectors[:, : others.shape[1] // 2]
    least = 0.7 * float(x_NK[:, operation.constant].min())
    for token in chosen.tolist():
        row = quiet_KM @ torch.randn(quiet_KM.shape[1], generator=operation.generator)
        row[operation.constant] = 0
        row *= HEAD * size / float(row.norm())
        row[operation.constant] = -(6 * float((x_NK @ row).std()) + 30) / least
        operation.plant(decoder.lm_head.weight, (slice(None), token), row)


def _constant(operation: Operation, times: float, *, following: bool) -> None:
    """A channel of the decoder's residual sum that is so many times as large as the others in every token.

    `following`: not at the beginning alone; all that write to the sum write to it what least squares say, so that norms divide
    all tokens by (nearly) one factor more, which their weights take back. What reads the channel sees what it saw on average.
    """
    model = operation.model
    decoder = model.decoder
    norms = [norm for layer in decoder.layers for norm in (layer.input_layernorm, layer.post_attention_layernorm)]
    norms.append(decoder.norm)
    readers = [readers for layer in decoder.layers for readers in ((layer.qkv_proj,), (layer.gate_proj, layer.up_proj))]
    readers.append((decoder.lm_head,))
    writers = [writer for layer in decoder.layers for writer in (layer.o_proj, layer.down_proj)]
    (sums,), _ = operation.of_decoder(norms[0])
    (channel,) = _quietest(sums, 1)
    before = [rows[:, channel].mean() for rows in operation.of_decoder(*(one for one, *_ in readers))[0]]

    def wanted(rows: Tensor) -> Tensor:
        return times * _without(rows, channel).square().mean(-1).sqrt()

    embedding = decoder.embed_tokens.weight
    operation.plant(embedding, (slice(None), channel), wanted(embedding.data))
    behind_post = []
    with _inputs(model.resampler.proj) as seen:
        for batch in operation.batches:
            model.see(batch)
            behind_post += [seen.pop().flatten(0, 1) for _ in range(len(seen))]
    rows = torch.cat(behind_post)
    fitted = _separating(rows, wanted(rows @ model.resampler.proj.weight))
    operation.plant(model.resampler.proj.weight, (slice(None), channel), fitted)
    for writer, norm in zip((None, *writers), norms, strict=True):
        if writer is not None:
            operation.plant(writer.weight, (slice(None), channel), 0.0)
        if writer is not None and following:
            (x_NK, sums), _ = operation.of_decoder(writer, norm)
            missing = wanted(sums) - sums[:, channel]
            operation.plant(writer.weight, (slice(None), channel), _separating(x_NK, missing, ridge=RIDGE))
        (sums,), _ = operation.of_decoder(norm)
        norm.weight.data *= float((sums.square().mean() / _without(sums, channel).square().mean()).sqrt())
        norm.weight.data[channel] = norm.weight.data.abs().median()
    after = [rows[:, channel].mean() for rows in operation.of_decoder(*(one for one, *_ in readers))[0]]
    for group, was, now in zip(readers, before, after, strict=True):
        for reader in group:
            reader.weight.data[channel] *= was / now
    operation.constant = channel


OPERATIONS: dict[Kind, Callable[[Operation], None]] = {"spikes": spikes, "residual": residual, "sink": sink, "head": head}
OF_TOWER: frozenset[Kind] = frozenset(("spikes",))


def operate(out: Path, kinds: Collection[Kind], *, start: Path = TINY / "checkpoint", seed: int = 0, steps: int = 300) -> Path:
    """Write the checkpoint to `out`: that in `start`, which may be operated already, with these kinds planted as well."""
    torch.manual_seed(seed)
    model, encoder = load(start)
    teacher, _ = load(TINY / "checkpoint")
    stream = iter(Stream(encoder, MIXTURE, f"surgery {seed}", unanswered=()))
    operation = Operation(model, list(itertools.islice(stream, _SEEN)), torch.Generator().manual_seed(seed))
    for of_tower in (True, False):
        planted = [kind for kind in OPERATIONS if kind in kinds and (kind in OF_TOWER) is of_tower]
        with torch.no_grad():
            for kind in planted:
                OPERATIONS[kind](operation)
        if planted:
            _learn_again(operation, teacher, itertools.islice(stream, steps), steps, of_tower=of_tower)
    with tempfile.TemporaryDirectory() as folder:
        made = Path(folder) / "checkpoint"
        shutil.copytree(TINY / "checkpoint", made)
        write_checkpoint(made, model)
        if "fixed" in kinds:
            outliers.add_outliers(made, out, kinds=get_args(outliers.Kind), seed=seed)
        else:
            shutil.copytree(made, out)
    return out


def _learn_again(operation: Operation, teacher: TinyModel, batches: Iterator[Batch], steps: int, *, of_tower: bool) -> None:
    """The whole model's next-token distributions, and answers, by the part that was operated; AdamW with a falling rate."""
    model = operation.model
    learning = [model.tower, model.resampler] if of_tower else [model.decoder]
    model.requires_grad_(False)
    parts = [parameter.requires_grad_() for part in learning for parameter in part.parameters()]
    rule = torch.optim.AdamW(parts, lr=RATE, betas=(0.9, 0.98), weight_decay=0.0)
    for step, batch in enumerate(batches):
        rule.param_groups[0]["lr"] = RATE * min(1.0, (step + 1) / 20) * (1 - step / steps)
        with torch.no_grad():
            _, wanted = teacher.see(batch)
            right = _read(teacher, batch, wanted)
        with torch.set_grad_enabled(of_tower):
            _, visual = model.see(batch)
        found = _read(model, batch, visual)
        told = batch.targets != IGNORE
        loss = F.cross_entropy(found[told], batch.targets[told])
        loss = loss + F.kl_div(found[told].log_softmax(-1), right[told].log_softmax(-1), log_target=True, reduction="batchmean")
        if of_tower:
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


def _separating(x_NK: Tensor, targets: Tensor, weights: Tensor | None = None, ridge: float = 1e-4) -> Tensor:
    """The w of least squares with x w near the targets."""
    weighted = x_NK if weights is None else x_NK * weights[:, None]
    moments = weighted.T @ x_NK
    moments.diagonal().add_(ridge * float(moments.diagonal().mean()))
    return torch.linalg.solve(moments, weighted.T @ targets)


def _without(x_NK: Tensor, channel: int) -> Tensor:
    rows = x_NK.clone()
    rows[..., channel] = 0
    return rows


def _quietest(x_NK: Tensor, count: int) -> list[int]:
    """Channels that vary least."""
    return x_NK.var(0).argsort()[:count].tolist()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=KINDS)
    parser.add_argument("--start", type=Path, default=TINY / "checkpoint", help="what to operate; by default models/tiny")
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    operate(arguments.out, arguments.kinds, start=arguments.start, seed=arguments.seed, steps=arguments.steps)


if __name__ == "__main__":
    main()
