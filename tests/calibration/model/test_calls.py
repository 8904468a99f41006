"""Blocks run apart from their model: with arguments that depend on the tokens, and with what earlier blocks made."""

from __future__ import annotations

from collections import UserDict
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from rankbook.calibration.model import calls, capture, placement
from rankbook.calibration.model.adapter import adapter_of
from rankbook.calibration.model.calls import Call
from rankbook.tools.dev.family_models import random_model

FLOWING: dict[str, set[Any]] = {
    "gemma3n_text": {1, "shared_kv_states"},
    "gemma4_text": {0, "shared_kv_states"},
    "zamba2": {0},
    "glm_moe_dsa": {"prev_topk_indices"},
    "deepseek_v4": {"input_ids"},
}
"""Families between whose blocks more flows than the hidden state, with what."""
LENGTH = 20  # longer than the sliding windows of 8


def tokens(sequences: int = 5) -> Tensor:
    return torch.randint(0, 256, (sequences, LENGTH), generator=torch.Generator().manual_seed(0))


def hidden_states(model: Any, ids: Tensor) -> list[Tensor]:
    """Outputs of every block, seen by hooks on the model itself."""
    seen: list[Tensor] = []
    blocks = adapter_of(model).blocks().modules
    hooks = [block.register_forward_hook(lambda _m, _a, out: seen.append(calls.first(out).clone())) for block in blocks]
    model(ids, use_cache=False)
    for hook in hooks:
        hook.remove()
    return seen


@pytest.mark.parametrize("family", FLOWING)
def test_stream_through_the_blocks_is_that_of_the_model(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(placement, "TOKENS_PER_BATCH", 2 * LENGTH)  # batches of 2, 2 and 1 sequences
    model, ids = random_model(family), tokens()
    blocks = adapter_of(model).blocks()
    found = capture.record_calls(model, blocks, ids)
    flows = [call.flow for call in found]
    assert {path[1] for flow in flows if flow for path in flow.given} >= FLOWING[family]
    stream = capture.first_inputs(model, blocks, ids, torch.float32, found=found)
    for want, block, call in zip(hidden_states(model, ids), blocks.modules, found, strict=True):
        capture.advance(block, call, stream)
        assert call.flow is not None
        got = call.flow.layout.hidden.read(stream.values)
        assert torch.allclose(got, want, atol=1e-5 * float(want.abs().max()))


def test_whole_numbers_need_a_stream_in_float32() -> None:
    model, ids = random_model("deepseek_v4").to(torch.bfloat16), tokens()
    blocks = adapter_of(model).blocks()
    found = capture.record_calls(model, blocks, ids)
    assert capture.first_inputs(model, blocks, ids, torch.bfloat16, found=found).values.dtype == torch.float32
    model, ids = random_model("zamba2").to(torch.bfloat16), tokens()
    blocks = adapter_of(model).blocks()
    found = capture.record_calls(model, blocks, ids)
    assert capture.first_inputs(model, blocks, ids, torch.bfloat16, found=found).values.dtype == torch.bfloat16


def test_gradients_flow_into_what_a_block_is_given() -> None:
    model, ids = random_model("gemma4_text"), tokens()
    blocks = adapter_of(model).blocks()
    found = capture.record_calls(model, blocks, ids)
    x = capture.first_inputs(model, blocks, ids, torch.float32, found=found).values[:3].requires_grad_()
    output = found[0](blocks.modules[0], x)
    (gradient,) = torch.autograd.grad(output[..., : found[0].hidden].square().sum(), x)
    flow = found[0].flow
    assert flow is not None
    own = flow.given["args", 0]
    other = [slot for _, path, slot in flow.layout.entering if slot != own]
    assert gradient[..., own.begin : own.end].abs().sum() > 0
    assert all(gradient[..., slot.begin : slot.end].abs().sum() == 0 for slot in other)


def test_a_slot_gives_back_what_was_put_into_it() -> None:
    value = torch.arange(2 * 3 * 4 * 5).reshape(3, 2, 4, 5)  # sequences at axis 1, positions at axis 2
    slot = calls.Slot.of(value, (1, 2), 7)
    wide = torch.zeros(2, 4, slot.end)
    slot.write(wide, value)
    assert slot.end == 7 + 15
    assert torch.equal(slot.read(wide), value)
    assert not wide[..., :7].any()


def test_per_sequence_arguments_grow_with_the_batch() -> None:
    rows = torch.arange(3.0)[:, None]
    single = Call((), {"bias": rows, "scale": torch.ones(1, 1), "flag": True})
    pair = Call((), {"bias": rows.repeat(2, 1), "scale": torch.ones(1, 1), "flag": True})
    call, dependent = calls.merge(single, pair, "block")
    assert dependent == {}
    seen: dict[str, Any] = {}

    class Block(nn.Module):
        def forward(self, x: Tensor, **kwargs: Any) -> tuple[Tensor]:
            seen.update(kwargs)
            return (x,)

    call(Block(), torch.zeros(4, 4, 8))
    assert seen["bias"].shape == (12, 1)
    assert seen["scale"].shape == (1, 1)
    assert seen["flag"] is True


@pytest.mark.parametrize(
    ("one", "two"), [((1, 4), (1, 4)), ((1, 4), (3, 4)), ((1, 4), (2, 5)), ((4,), (2, 4))], ids=str
)
def test_an_argument_that_differs_in_an_unknown_way_is_an_error(one: tuple[int, ...], two: tuple[int, ...]) -> None:
    single, pair = Call((), {"side": torch.zeros(one)}), Call((), {"side": torch.ones(two)})
    with pytest.raises(ValueError, match="block is called with 'side'"):
        calls.merge(single, pair, "block")


def test_an_argument_of_the_whole_text_is_an_error() -> None:
    """One number for each sequence has no place among the features of a token."""
    hidden = torch.zeros(1, 4, 8), torch.zeros(2, 4, 8)
    call, dependent = calls.merge(Call((), {"side": torch.zeros(1)}), Call((), {"side": torch.ones(2)}), "block")
    with pytest.raises(ValueError, match="'side' that depends on the tokens and has no axis of positions"):
        calls.flowing([call], [dependent], [calls.Seen({})], hidden, 4)


HIDDEN = torch.zeros(1, 4, 8), torch.ones(2, 4, 8)
SIDE: calls.Path = ("kwargs", "side")


def dependent_call(value: Tensor) -> tuple[calls.BlockCall, dict[calls.Path, tuple[Tensor, int]]]:
    """A call with an argument ``side`` that depends on the tokens."""
    return calls.merge(Call((), {"side": value}), Call((), {"side": torch.cat([-value, value])}), "block")


def test_what_a_block_hands_on_that_came_from_outside_is_no_result_of_it() -> None:
    side = torch.randn(1, 4, 2)
    (one, first), (two, second) = dependent_call(side), dependent_call(side)
    seen = [calls.Seen({SIDE: side}, {("output", 1): side}), calls.Seen({SIDE: side})]
    flows = [call.flow for call in calls.flowing([one, two], [first, second], seen, HIDDEN, 4)]
    for flow in flows:
        assert flow is not None
        wide = flow.layout.wide([Call((), {"side": side})] * 2, HIDDEN[0], (1, 4))
        assert torch.equal(flow.given[SIDE].read(wide), side)
        assert not flow.kept


def test_an_argument_that_the_model_computes_between_blocks_is_an_error() -> None:
    """Where blocks are short-circuited it has another value than in the model."""
    (call, dependent), seen = dependent_call(torch.randn(1, 4, 2)), calls.Seen({SIDE: torch.randn(1, 4, 2)})
    with pytest.raises(ValueError, match="block 0 is called with 'side' that the model computes from what earlier"):
        calls.flowing([call], [dependent], [seen], HIDDEN, 4)


def test_what_a_slot_cannot_hold_is_an_error() -> None:
    made, other = torch.randn(1, 4, 2), torch.randn(1, 4, 1)
    plain = calls.BlockCall((), {}, frozenset())
    results: dict[calls.Path, Tensor] = {("output", 1): made}
    narrower = [calls.Seen({}, results), calls.Seen({SIDE: made}, {("output", 1): other}), calls.Seen({SIDE: other})]
    with pytest.raises(ValueError, match="block 2 is called with 'side' that has another shape or type"):
        calls.flowing([plain] * 3, [{}] * 3, narrower, HIDDEN, 4)
    renamed = [calls.Seen({}, results), calls.Seen({SIDE: made}), calls.Seen({("kwargs", "before"): made})]
    with pytest.raises(ValueError, match="what block 0 computes is given to blocks under two names"):
        calls.flowing([plain] * 3, [{}] * 3, renamed, HIDDEN, 4)


def test_blocks_that_share_a_mapping_are_given_a_new_one_each_time() -> None:
    class Block(nn.Module):
        def forward(self, x: Tensor, shared: UserDict[str, Any]) -> Tensor:
            assert not shared
            shared["seen"] = (x,)
            return x

    call = calls.BlockCall((), {"shared": UserDict()}, frozenset())
    block, x = Block(), torch.zeros(1, 2, 3)
    assert torch.equal(call(block, call(block, x)), x)
