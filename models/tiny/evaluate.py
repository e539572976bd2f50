"""Exact match of a checkpoint's greedy answers on held-out pictures, by kind of question.

python models/tiny/evaluate.py models/tiny/checkpoint --count 1000
"""

from __future__ import annotations

import argparse
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import torch
from batches import Batch, Encoded, Encoder, collate
from model import TinyModel, empty_cache
from questions import Example
from scenes import held_out
from torch import Tensor

from mcv_export.checkpoint import open_checkpoint
from mcv_export.families.minicpmv2_6 import FAMILY
from mcv_export.plan import ModelPlan
from mcv_export.sources import resolve
from mcv_graphs.decoder import Decoder
from mcv_graphs.layers import Linear


def load(folder: Path) -> tuple[TinyModel, Encoder]:
    """The published files as eager modules in float32, and the matching encoder."""
    checkpoint = open_checkpoint(folder)
    plan: ModelPlan = FAMILY.plan(checkpoint)
    model = TinyModel(plan.text.vocab_size)
    for graph, module in zip(plan.graphs, (model.tower, model.resampler, model.decoder), strict=True):
        for name, source in resolve(graph, checkpoint).items():
            owner, _, _ = name.rpartition(".")
            value = torch.from_numpy(source.rows(0, source.shape[0]))
            parameter = module.get_parameter(name)
            linear = isinstance(module.get_submodule(owner), Linear) and value.ndim == 2 and not name.endswith("bias")
            parameter.data.copy_((value.T if linear else value).reshape(parameter.shape))
    return model.eval(), Encoder(folder, plan.image)


@torch.inference_mode()
def answers(model: TinyModel, encoder: Encoder, examples: list[Example], limit: int = 48) -> Iterator[tuple[Example, str]]:
    """Each example with the model's greedy answer; examples of equal prompt length and slices are decoded together."""
    groups: dict[object, list[tuple[Example, Encoded]]] = defaultdict(list)
    for example in examples:
        encoded = encoder(example)
        groups[encoded.shape_key, encoded.prompt_length].append((example, encoded))
    for group in groups.values():
        for first in range(0, len(group), 32):
            part = group[first : first + 32]
            tokens = greedy(model, collate([encoded for _, encoded in part]), part[0][1].prompt_length, encoder.end, limit)
            for (example, _), row in zip(part, tokens, strict=True):
                yield example, encoder.tokenizer.decode(row, skip_special_tokens=False).strip()


def greedy(model: TinyModel, batch: Batch, prompt_length: int, end: int, limit: int) -> list[list[int]]:
    """Token ids of each row's answer, without the end token."""
    decoder: Decoder = model.decoder
    _, visual = model.see(batch)
    count = len(batch.input_ids)
    ids, vision = batch.input_ids[:, :prompt_length], torch.cat(visual, dim=1).flatten(0, 1)
    rows = torch.arange(count)[:, None] * prompt_length
    positions = (batch.vision_positions.view(count, -1) % batch.input_ids.shape[1] + rows).flatten()
    past, unused = empty_cache(decoder, count), torch.zeros(1, dtype=torch.int32)
    found: list[Tensor] = []
    while len(found) < limit and not (found and bool((torch.stack(found) == end).any(0).all())):
        last = torch.arange(1, count + 1) * ids.shape[1] - 1
        logits, past = decoder(ids, vision, positions, last, unused, unused, past)
        found.append(logits.argmax(-1))
        ids, vision, positions = found[-1][:, None], vision[:0], positions[:0]
    columns = torch.stack(found, dim=1).tolist()
    return [row[: row.index(end)] if end in row else row for row in columns]


def report(results: list[tuple[Example, str]]) -> str:
    """A Markdown table: right answers and examples of each kind."""
    counts: dict[str, list[bool]] = defaultdict(list)
    for example, answer in results:
        counts[example.kind].append(answer == example.answer)
    rows = [*sorted(counts.items()), ("all", [right for kind in counts.values() for right in kind])]
    lines = [f"| {kind} | {sum(right)} / {len(right)} | {100 * sum(right) / len(right):.1f} % |" for kind, right in rows]
    return "\n".join(["| kind | right | share |", "|---|---|---|", *lines])


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--count", type=int, default=1000, help="number of held-out examples")
    parser.add_argument("--seed", type=int, default=0, help="another seed gives other examples")
    parser.add_argument("--wrong", type=int, default=0, help="print this many wrong answers")
    options = parser.parse_args()
    model, encoder = load(options.checkpoint)
    results = list(answers(model, encoder, list(held_out(options.count, options.seed))))
    wrong = [(example, answer) for example, answer in results if answer != example.answer]
    for example, answer in wrong[: options.wrong]:
        print(f"{example.kind}: {example.question} {example.answer!r}, not {answer!r}")
    print(report(results))


if __name__ == "__main__":
    main()
