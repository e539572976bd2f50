"""Which embeddings and heads stay in 8 bits: those with outliers that 4 bits would bury, and no others."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from mcv_calibration.recipe import Recipe
from mcv_export.checkpoint import open_checkpoint
from mcv_export.families.minicpmv2_6 import FAMILY
from mcv_export.precision import Wishes, resolved
from mcv_export.table_screen import screened

Edit = Callable[[dict[str, torch.Tensor]], None]


def a_large_channel(tensors: dict[str, torch.Tensor]) -> None:
    table = tensors["llm.model.embed_tokens.weight"]
    table[:, 3] = 26 * table.float().square().mean().sqrt()


def a_huge_row(tensors: dict[str, torch.Tensor]) -> None:
    tensors["llm.lm_head.weight"][5] *= 30


def a_small_channel(tensors: dict[str, torch.Tensor]) -> None:
    tensors["llm.model.embed_tokens.weight"][:, 3] /= 100
    tensors["llm.lm_head.weight"][5] /= 100


@pytest.mark.parametrize(
    ("edit", "expected"), [(a_large_channel, {"embed_tokens"}), (a_huge_row, {"lm_head"}), (a_small_channel, set())]
)
def test_what_stands_out_is_kept(edit: Edit, expected: set[str], edit_tensors: Callable[[Edit], Path]) -> None:
    checkpoint = open_checkpoint(edit_tensors(edit))
    plan = FAMILY.plan(checkpoint)

    def layers(wishes: Wishes) -> dict[str, str]:
        recipe: Recipe = resolved(wishes.recipe(), [graph.name for graph in plan.graphs])
        return dict(screened(plan, checkpoint, recipe).graphs["decoder_with_past"].layers)

    assert layers(Wishes()) == dict.fromkeys(expected, "q8")
    assert layers(Wishes(precision="q8")) == {}
    named = {"embed_tokens": "q4", "lm_head": "fp32"}
    assert layers(Wishes(settings={"decoder_with_past": {"layers": named}})) == named
