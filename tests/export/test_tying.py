"""An output head of a checkpoint's own is used, whatever its config says of tying."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from mcv_export.checkpoint import open_checkpoint
from mcv_export.families import recognise
from mcv_export.sources import resolve
from mcv_runtime.errors import CheckpointError

NAMES = {
    **dict.fromkeys(("minicpmv2_0", "minicpmv2_6", "minicpmv4_5"), ("llm.model.embed_tokens.weight", "llm.lm_head.weight")),
    **dict.fromkeys(
        ("minicpmv4_6", "minicpmv4_7", "minicpm_ocr"), ("model.language_model.embed_tokens.weight", "lm_head.weight")
    ),
}


@pytest.fixture
def weights(copy_checkpoint: Callable[..., Path]) -> Callable[..., dict[str, torch.Tensor]]:
    """Table and head of the graph that a checkpoint with these tensors and this flag makes."""

    def made(family: str, tied: bool | None, **tensors: torch.Tensor | None) -> dict[str, torch.Tensor]:
        def say(config: dict[str, object]) -> None:
            config["tie_word_embeddings"] = tied
            if tied is False and "text_config" in config:
                config["text_config"]["tie_word_embeddings"] = tied  # type: ignore[index]

        folder = copy_checkpoint(family, say)
        found = load_file(folder / "model.safetensors")
        for name, key in zip(("table", "head"), NAMES[family], strict=True):
            if name in tensors:
                value = tensors[name]
                found.pop(key, None)
                if value is not None:
                    found[key] = value.contiguous()
        save_file(found, folder / "model.safetensors")
        checkpoint = open_checkpoint(folder)
        plan = recognise(checkpoint.config).plan(checkpoint)
        unknown = {name for name in NAMES[family] if name in found and not name.startswith(plan.ignored or ("-",))}
        decoder = plan.graphs[-1]
        assert unknown <= {p.tensor for parts in decoder.weights.values() for p in parts} | set(decoder.used)
        sources = resolve(decoder, checkpoint)
        return {n: torch.from_numpy(sources[f"{n}.weight"].all()) for n in ("embed_tokens", "lm_head")} | {
            "tied": torch.tensor(bool(decoder.tied))
        }

    return made


def original(golden_root: Path, family: str) -> torch.Tensor:
    return load_file(golden_root / family / "checkpoint" / "model.safetensors")[NAMES[family][0]].float()


@pytest.mark.parametrize("family", NAMES)
@pytest.mark.parametrize("tied", [True, False])
def test_a_head_that_differs_is_used(
    family: str, tied: bool, weights: Callable[..., dict[str, torch.Tensor]], golden_root: Path
) -> None:
    table = original(golden_root, family)
    made = weights(family, tied, table=table, head=table.flip(0))
    scale = made["lm_head"][-1] / table[0]
    assert torch.allclose(scale, scale[0])  # 2.0 multiplies its logits
    assert torch.equal(made["lm_head"], (table * scale[0]).flip(0))
    assert not made["tied"]


@pytest.mark.parametrize("family", NAMES)
def test_one_that_is_missing_is_the_other(
    family: str, weights: Callable[..., dict[str, torch.Tensor]], golden_root: Path
) -> None:
    table = original(golden_root, family)
    for tensors in ({"table": table, "head": None}, {"table": None, "head": table}, {"table": table, "head": table.clone()}):
        made = weights(family, True, **tensors)
        for name in ("embed_tokens", "lm_head"):
            scale = made[name][0] / table[0]
            assert torch.equal(made[name], table * scale[0])
        assert bool(made["tied"]) == (family in ("minicpmv4_6", "minicpmv4_7", "minicpm_ocr"))  # the others store both


@pytest.mark.parametrize("family", NAMES)
def test_a_head_is_missing(family: str, weights: Callable[..., dict[str, torch.Tensor]]) -> None:
    with pytest.raises(CheckpointError, match=f"no tensor {NAMES[family][1]}"):
        weights(family, False, head=None)


def test_transformers_4_does_not_write_what_minicpm_has_by_default(
    weights: Callable[..., dict[str, torch.Tensor]], golden_root: Path
) -> None:
    table = original(golden_root, "minicpmv2_0")
    made = weights("minicpmv2_0", None, table=table, head=None)
    assert torch.equal(made["lm_head"], table * (made["lm_head"][0] / table[0])[0])


@pytest.mark.parametrize("family", ["minicpmv4_6", "minicpmv4_7", "minicpm_ocr"])
def test_no_word_of_tying_means_tied(family: str, weights: Callable[..., dict[str, torch.Tensor]]) -> None:
    assert weights(family, None)["tied"]


@pytest.mark.parametrize("family", ["minicpmv4_6"])
def test_transformers_keeps_both(
    family: str, weights: Callable[..., dict[str, torch.Tensor]], tmp_path: Path, golden_root: Path
) -> None:
    transformers = pytest.importorskip("transformers", minversion="5.24")
    table = original(golden_root, family)
    weights(family, True, table=table, head=table.flip(0))
    model = transformers.AutoModelForImageTextToText.from_pretrained(tmp_path / f"changed-{family}" / "checkpoint").float()
    assert torch.equal(model.lm_head.weight, table.flip(0))
    assert torch.equal(model.get_input_embeddings().weight, table)
