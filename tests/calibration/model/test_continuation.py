"""Models that scale positions by the length of the text: windows and continuations are what transformers computes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from rankbook.calibration.model import capture
from rankbook.calibration.model.adapter import adapter_of
from rankbook.calibration.model.calls import first
from rankbook.calibration.model.continuation import Continuation
from rankbook.tools.dev.family_models import random_model
from tests.tiny import tiny_model

DYNAMIC = {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 10000.0}
LONG = {
    "rope_type": "longrope", "factor": 4.0, "rope_theta": 10000.0, "original_max_position_embeddings": 16,
    "short_factor": [1.0] * 6, "long_factor": [4.0] * 6,
}  # fmt: skip
CHANGING: dict[str, dict[str, Any]] = {
    "llama": {"max_position_embeddings": 16, "rope_parameters": DYNAMIC},
    "phi3": {"max_position_embeddings": 64, "original_max_position_embeddings": 16, "rope_parameters": LONG},
}
"""Both change at 16 positions."""


def hidden_states(model: Any, ids: Tensor) -> list[Tensor]:
    seen: list[Tensor] = []
    hooks = [
        block.register_forward_hook(lambda _m, _a, out: seen.append(first(out).detach()))
        for block in adapter_of(model).blocks().modules
    ]
    with torch.no_grad():
        model(ids, use_cache=False)
    for hook in hooks:
        hook.remove()
    return seen


@pytest.mark.parametrize("family", CHANGING)
@pytest.mark.parametrize("length", [12, 40])
def test_windows_beyond_the_original_context(family: str, length: int) -> None:
    ids = torch.randint(0, 256, (3, length), generator=torch.Generator().manual_seed(0))
    want = hidden_states(tiny_model(family, **CHANGING[family]), ids)
    alone = hidden_states(tiny_model(family, **CHANGING[family]), ids[:, :12])
    # Beyond 16 positions the first ones are scaled in another way than without the text behind them.
    assert torch.allclose(want[0][:, :12], alone[0], atol=1e-5) == (length == 12)
    model = tiny_model(family, **CHANGING[family])
    blocks = adapter_of(model).blocks()
    calls = capture.record_calls(model, blocks, ids)
    stream = capture.first_inputs(model, blocks, ids, torch.float32)
    for block, call, state in zip(blocks.modules, calls, want, strict=True):
        capture.advance(block, call, stream)
        assert torch.allclose(stream.values, state, atol=1e-5)


@pytest.mark.parametrize("family", [*CHANGING, "gemma2"])
def test_a_continuation_is_that_of_generate(family: str) -> None:
    """The text passes 16 positions; every next token and its logits are those of transformers."""
    changes = CHANGING.get(family, {})
    prompt = torch.randint(0, 256, (2, 10), generator=torch.Generator().manual_seed(1))
    settings = {"max_new_tokens": 20, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}
    want = tiny_model(family, **changes).generate(prompt, **settings, eos_token_id=None, pad_token_id=0)
    text, tokens = Continuation(tiny_model(family, **changes)), prompt
    with torch.no_grad():
        for logits in want.logits:
            found = text.extend(tokens)
            assert torch.allclose(found, logits, atol=1e-4)
            tokens = logits.argmax(-1, keepdim=True)


@pytest.mark.parametrize("family", ["minimax", "recurrent_gemma"])
def test_a_cache_of_a_class_of_its_own_or_none_gives_the_same_text(family: str) -> None:
    model, tokens = random_model(family), torch.arange(20)[None] * 7 % 250
    text = Continuation(model)
    with torch.no_grad():
        want = model(input_ids=tokens, use_cache=False).logits[0]
        found = [text.extend(tokens[:, :15]), *(text.extend(tokens[:, at : at + 1]) for at in range(15, 20))]
    assert torch.allclose(torch.cat(found), want[14:], atol=1e-4)


@pytest.mark.parametrize(("family", "context", "longest"), [("llama", 16, 64), ("phi3", 16, 64), ("gemma2", 128, 128)])
def test_how_long_a_text_may_be_with_and_without_a_growing_cache(family: str, context: int, longest: int) -> None:
    adapter = adapter_of(tiny_model(family, **CHANGING.get(family, {})))
    assert (adapter.context(), adapter.longest_text()) == (context, longest)
