"""Running block by block gives what the model itself computes, for every family."""

from __future__ import annotations

import pickle
from typing import Any

import pytest
import torch
from torch import nn

from rankbook.calibration.fitting.statistics import LayerStatistics
from rankbook.calibration.model import capture, placement
from rankbook.calibration.model.adapter import adapter_of
from rankbook.calibration.model.calls import BlockCall, first
from rankbook.calibration.model.experts import matrix_of
from rankbook.calibration.model.plain import make_plain
from rankbook.tools.dev.family_models import random_model
from tests.tiny import FAMILIES, tiny_model


def tokens(sequences: int = 5, length: int = 20) -> torch.Tensor:
    """Random bytes; longer than the sliding windows of 8."""
    return torch.randint(0, 256, (sequences, length), generator=torch.Generator().manual_seed(0))


def hidden_states(model: Any, ids: torch.Tensor) -> list[torch.Tensor]:
    """Inputs of every block and output of the last one, seen by hooks on the model itself."""
    seen: list[torch.Tensor] = []
    blocks = adapter_of(model).blocks().modules
    hooks = [block.register_forward_pre_hook(lambda _, args: seen.append(args[0].detach())) for block in blocks]
    hooks.append(blocks[-1].register_forward_hook(lambda _m, _a, out: seen.append(first(out).detach())))
    model(ids, use_cache=False)
    for hook in hooks:
        hook.remove()
    return seen


@pytest.mark.parametrize("family", FAMILIES)
def test_stream_through_the_blocks_is_that_of_the_model(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(placement, "TOKENS_PER_BATCH", 40)  # batches of 2, 2 and 1 sequences
    model, ids = tiny_model(family), tokens()
    blocks = adapter_of(model).blocks()
    calls = capture.record_calls(model, blocks, ids)
    assert calls[0].flow is None
    stream = capture.first_inputs(model, blocks, ids, torch.float32, found=calls)
    for want, block, call in zip(hidden_states(model, ids), blocks.modules, calls, strict=False):
        # Batches of another size add up in another order: float32 rounding, well below 1e-5 of values near 1.
        assert torch.allclose(stream.values, want, atol=1e-5)
        capture.advance(block, call, stream)
    assert torch.allclose(stream.values, hidden_states(model, ids)[-1], atol=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_model_in_bfloat16_runs_in_float32_and_is_left_as_it_was(family: str) -> None:
    model, ids = tiny_model(family).to(torch.bfloat16), tokens()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    blocks = adapter_of(model).blocks()
    calls = capture.record_calls(model, blocks, ids)
    stream = capture.first_inputs(model, blocks, ids, torch.float32)
    for block, call in zip(blocks.modules, calls, strict=True):
        with placement.in_float32(block):
            capture.advance(block, call, stream)
    after = model.state_dict()
    assert all(after[name].dtype == torch.bfloat16 and torch.equal(after[name], before[name]) for name in before)
    want = hidden_states(model.float(), ids)[-1]
    # The weights are the same; what differs is Gemma's factor sqrt(hidden), which bfloat16 rounds to 8 bits.
    assert torch.allclose(stream.values, want, rtol=1e-2, atol=1e-2 * float(want.abs().max()))


def test_statistics_are_those_of_the_inputs_and_shared_where_the_input_is() -> None:
    model, ids = tiny_model("llama"), tokens()
    blocks = adapter_of(model).blocks()
    calls = capture.record_calls(model, blocks, ids)
    stream = capture.first_inputs(model, blocks, ids, torch.float32)
    block: Any = blocks.modules[0]
    names = [name for name, module in block.named_modules() if isinstance(module, nn.Linear)]
    statistics = capture.collect(block, calls[0], stream.values, names)
    x = block.input_layernorm(stream.values).reshape(-1, 48)
    q, k, v = (statistics[f"self_attn.{name}_proj"] for name in "qkv")
    assert q is k is v
    assert q.tokens == 100
    assert torch.allclose(q.gram, x.T @ x, rtol=1e-5, atol=1e-4)
    assert statistics["mlp.gate_proj"] is statistics["mlp.up_proj"]
    assert statistics["mlp.gate_proj"] is not q
    assert statistics["mlp.down_proj"].gram.shape == (80, 80)
    assert not block.self_attn.q_proj._forward_pre_hooks


def test_statistics_of_parts_of_a_text_add_up_and_travel() -> None:
    """Of experts what entered them travels, not their Gram matrices."""
    model = random_model("mixtral")
    make_plain(model)
    ids, blocks = tokens(), adapter_of(model).blocks()
    call, block = capture.record_calls(model, blocks, ids)[0], blocks.modules[0]
    values = capture.first_inputs(model, blocks, ids, torch.float32).values
    names = [name for name, module in block.named_modules() if isinstance(module, nn.Linear)]
    names += [name for name in dict(block.named_modules()) if matrix_of(name)]
    whole = capture.collect(block, call, values, names)
    first, *others = (capture.collect(block, call, part, names) for part in torch.split(values, 2))
    for part in others:
        sent = pickle.dumps(part)
        assert b"ExpertMatri" not in sent
        first.add(pickle.loads(sent))
    assert first["self_attn.q_proj"] is first["self_attn.k_proj"]
    assert first.few_tokens() == whole.few_tokens()
    for name in names:
        found, wanted = first[name], whole[name]
        assert found.tokens == wanted.tokens
        for own, other in ((found.gram, wanted.gram), (found.mean_abs, wanted.mean_abs), (found.peak, wanted.peak)):
            assert torch.allclose(own, other, rtol=1e-4, atol=1e-4 * float(other.abs().max())), name


def test_parts_add_up_where_layers_do_not_share_their_inputs_in_all_of_them() -> None:
    """A layer that no token of a part reaches shares nothing there; statistics that differ could not be one."""

    def apart(tokens: int) -> capture.BlockStatistics:
        found = {name: LayerStatistics.empty(4) for name in ("gate", "up")}
        for one in found.values() if tokens else ():
            one.update(torch.ones(tokens, 4))
        return capture.BlockStatistics(found, {})

    def together(tokens: int) -> capture.BlockStatistics:
        one = apart(tokens)["gate"]
        return capture.BlockStatistics({"gate": one, "up": one}, {})

    for own, more in ((together(3), apart(0)), (apart(0), together(3)), (apart(1), together(2))):
        own.add(more)
        assert [own[name].tokens for name in ("gate", "up")] == [3, 3]
        assert torch.equal(own["up"].gram, torch.full((4, 4), 3.0))
    with pytest.raises(RuntimeError, match="share their inputs in one part"):
        together(3).add(apart(3))


def test_a_stream_in_fp16_becomes_float32_where_fp16_does_not_hold() -> None:
    factors = {"block 0": 2.0, "block 1": 1000.0, "block 2": 0.5}
    stream = placement.Stream(torch.linspace(1, 60, 5 * 4 * 8).view(5, 4, 8).half())
    want, call = stream.values.float(), BlockCall((), {}, frozenset())
    for name, factor in factors.items():
        block = nn.Linear(8, 8, bias=False)
        block.weight.data = factor * torch.eye(8)
        capture.advance(block, call, stream, name)
        want *= factor
        assert stream.values.dtype == (torch.float16 if name == "block 0" else torch.float32)
    assert torch.allclose(stream.values, want, rtol=2**-10)  # what is exact in float32 was rounded to fp16 once


def test_values_that_are_not_finite_are_refused_by_the_name_of_the_block() -> None:
    block = nn.Linear(8, 8, bias=False)
    block.weight.data = torch.full((8, 8), 3e38)
    with pytest.raises(ValueError, match=r"model\.layers\.3 computes NaN or infinity"):
        capture.advance(block, BlockCall((), {}, frozenset()), placement.Stream(torch.ones(1, 2, 8)), "model.layers.3")


def test_an_input_that_is_changed_in_place_is_not_shared() -> None:
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(16, 16), nn.Linear(16, 16)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            total: torch.Tensor = self.a(x)
            total += self.b(x.add_(1))
            return total

    call = BlockCall((), {}, frozenset())
    statistics = capture.collect(Block(), call, torch.randn(2, 3, 16), ["a", "b"])
    assert statistics["a"] is not statistics["b"]


def test_a_layer_that_is_never_called_has_no_tokens() -> None:
    block = nn.Sequential(nn.Linear(16, 16))
    block.add_module("unused", nn.Linear(8, 8))
    block.forward = block[0].forward  # type: ignore[method-assign]
    statistics = capture.collect(block, BlockCall((), {}, frozenset()), torch.randn(1, 2, 16), ["0", "unused"])
    assert statistics["unused"].tokens == 0
    assert statistics["unused"].gram.shape == (8, 8)


def test_gradients_flow_through_a_call() -> None:
    model, ids = tiny_model("gemma2"), tokens()
    blocks = adapter_of(model).blocks()
    calls = capture.record_calls(model, blocks, ids)
    x = capture.first_inputs(model, blocks, ids, torch.float32).values[:3].requires_grad_()
    (gradient,) = torch.autograd.grad(calls[1](blocks.modules[1], x).square().sum(), x)
    assert gradient.abs().sum() > 0


def test_a_model_without_blocks_is_an_error() -> None:
    with pytest.raises(ValueError, match="decoder-only"):
        adapter_of(nn.Sequential(nn.Linear(2, 2))).blocks()
