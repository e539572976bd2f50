"""Each fused operator, as ONNX Runtime computes it, against the module's plain torch body."""

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
import torch
from torch import nn

from mcv_export.plan import GraphPlan
from mcv_export.trace import trace
from mcv_graphs import ops
from mcv_graphs.contract import GraphIO, decoder_io, key_value_cache
from mcv_graphs.decoder import Decoder, DecoderConfig
from mcv_graphs.layers import LayerNorm, RMSNorm
from mcv_graphs.resampler import sincos_positions
from mcv_runtime.bundle.manifest import TensorSpec
from mcv_runtime.sessions.graphs import cpu_session, session_options

WIDTH = 64


class Norms(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer, self.rms = LayerNorm(WIDTH, 1e-6), RMSNorm(WIDTH, 1e-6)

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        a, s = self.layer.skip(self.rms(x), y)
        b, t = self.rms.skip(a, s)
        return self.layer(b) + t


class Activations(nn.Module):
    def __init__(self) -> None:
        super().__init__()

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return ops.gelu_tanh(x) + ops.silu(y)


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return ops.multi_head_attention(x, y, x + y, num_heads=4)


@pytest.mark.parametrize("kind", [Norms, Activations, Attention])
def test_emitted_equals_eager(kind: type[nn.Module], tmp_path: Path) -> None:
    spec = TensorSpec(dtype="float32", shape=("batch", "length", WIDTH))
    io = GraphIO(inputs={"x": spec, "y": spec}, outputs={"z": spec})
    module = _filled(kind())
    path = _export(GraphPlan(name="resampler", module=kind, io=io, weights={}), dict(module.named_parameters()), tmp_path)
    x, y = torch.randn(2, 3, 9, WIDTH, generator=torch.Generator().manual_seed(0))
    (found,) = cpu_session(path, session_options(1)).run(None, {"x": x.numpy(), "y": y.numpy()})
    np.testing.assert_allclose(found, module(x, y).detach().numpy(), rtol=1e-5, atol=1e-5)


# ONNX Runtime's CPU kernel takes several tokens after a cache for one sequence only.
@pytest.mark.parametrize(("batch", "chunks"), [(2, [12]), (2, [10, 1, 1]), (1, [5, 4, 1, 1, 1])])
def test_decoder_reads_in_one_piece_in_chunks_and_after_a_cache(batch: int, chunks: list[int], tmp_path: Path) -> None:
    """Against attention over everything in torch."""
    config = DecoderConfig(
        vocab_size=50, hidden_size=WIDTH, intermediate_size=96, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=32,
        context_length=40, rms_norm_eps=1e-6, rope_theta=1e4, qkv_bias=True,
    )  # fmt: skip
    module = _filled(Decoder(config))
    io = decoder_io(50, WIDTH, key_value_cache(2, 2, 32))
    plan = GraphPlan(name="decoder_with_past", module=lambda: Decoder(config), io=io, weights={})
    path = _export(plan, dict(module.named_parameters()) | dict(module.named_buffers()), tmp_path)
    session = cpu_session(path, session_options(1))
    ids = np.arange(batch * 12).reshape(batch, 12) * 7 % 50
    visual, at = np.random.default_rng(0).normal(size=(3, WIDTH)).astype(np.float32), np.array([1, 2, batch * 12 - 1])
    with torch.no_grad():
        empty = [torch.zeros(batch, 2, 0, 32)] * 4
        numbers = torch.zeros(batch, dtype=torch.int32), torch.zeros(1, dtype=torch.int32)
        expected, _ = module(
            torch.tensor(ids), torch.tensor(visual), torch.tensor(at), torch.arange(batch * 12), *numbers, empty
        )
    expected = expected.view(batch, 12, 50).numpy()
    past = {entry.input: np.zeros((batch, 2, 16, 32), np.float32) for entry in io.cache}
    start = 0
    for length in chunks:
        stop = start + length
        rows = np.flatnonzero((at % 12 >= start) & (at % 12 < stop))
        logits, *present = session.run(
            None,
            {
                "input_ids": ids[:, start:stop],
                "vision_embeds": visual[rows],
                "vision_positions": at[rows] // 12 * length + at[rows] % 12 - start,
                "logit_positions": np.arange(batch * length),
                "seqlens_k": np.full(batch, stop - 1, np.int32),
                "total_sequence_length": np.array([stop], np.int32),
                **past,
            },
        )
        np.testing.assert_allclose(logits.reshape(batch, length, 50), expected[:, start:stop], rtol=1e-4, atol=1e-4)
        past = dict(zip(past, present, strict=True))
        start = stop


def test_sincos_positions_put_the_column_first() -> None:
    found = sincos_positions(torch.tensor([[3, 5]]), torch.tensor([1.0, 0.01]))
    expected = [np.sin(5), np.sin(0.05), np.cos(5), np.cos(0.05), np.sin(3), np.sin(0.03), np.cos(3), np.cos(0.03)]
    np.testing.assert_allclose(found[0], expected, rtol=1e-6)


def _filled(module: nn.Module) -> nn.Module:
    generator = torch.Generator().manual_seed(1)
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.3, generator=generator)
    return module.requires_grad_(False)


def _export(plan: GraphPlan, values: Mapping[str, torch.Tensor], folder: Path) -> Path:
    """The traced graph with `values` inside it."""
    model, _ = trace(plan)
    for name, value in model.graph.initializers.items():
        if value.const_value is None:
            value.const_value = ir.tensor(values[name].detach().numpy(), name=name)
    ir.save(model, folder / "graph.onnx")
    return folder / "graph.onnx"
