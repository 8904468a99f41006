"""Statistics of experts are those of what enters them, and those of one expert at a time are in memory."""

from __future__ import annotations

import gc
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch

from rankbook.calibration.driver import solve as solving
from rankbook.calibration.driver.run import quantize_model
from rankbook.calibration.fitting.statistics import LayerStatistics
from rankbook.calibration.model import capture, experts
from rankbook.calibration.model.calls import BlockCall
from rankbook.calibration.model.plain import make_plain
from rankbook.tools.dev.family_models import random_model, tiny
from tests.calibration.runs import options

FAMILIES = ("mixtral", "gpt_oss", "nemotron_h")


@pytest.mark.parametrize("family", FAMILIES)
def test_they_are_those_of_hooks_at_every_layer(family: str) -> None:
    model = random_model(family)
    make_plain(model)
    owner = next(name for name, module in model.named_modules() if hasattr(module, "down_proj") and "experts" in name)
    module = model.get_submodule(owner)
    names = [name for name, _ in module.named_modules() if experts.matrix_of(f"x.{name}")]
    seen = {name: LayerStatistics.empty(module.get_submodule(name).in_features) for name in names}

    def note(name: str) -> Any:
        return lambda _module, args: seen[name].update(args[0])

    hooks = [module.get_submodule(name).register_forward_pre_hook(note(name)) for name in names]
    tokens, generator = 40, torch.Generator().manual_seed(0)
    width, count = module.get_submodule(names[0]).in_features, len(experts.linears(module))
    stream = torch.randn(2, tokens, width, generator=generator)
    chosen = torch.stack([torch.randperm(count - 1, generator=generator)[:2] for _ in range(2 * tokens)])
    chosen[5:] = torch.tensor([1, 0])  # one expert sees nothing, some see few

    class Mixture(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.experts = module

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            flat = x.reshape(-1, width)
            return self.experts(flat, chosen[: len(flat)], torch.ones(len(flat), 2)).view_as(x)

    layers = [f"experts.{name}" for name in names]
    found = capture.collect(Mixture(), BlockCall((), {}, frozenset()), stream, layers)
    for hook in hooks:
        hook.remove()
    assert list(found) == layers
    scarce = {f"experts.{name}" for name in names if seen[name].tokens < len(seen[name].gram)}
    assert set(found.few_tokens()) == scarce
    assert scarce
    for matrix, members in experts.stacks(layers).items():
        everyone = LayerStatistics.empty(len(seen[members[0].removeprefix("experts.")].gram))
        for name in members:
            everyone.add(seen[name.removeprefix("experts.")])
        for name in members:
            own = seen[name.removeprefix("experts.")]
            want, got = own.filled_up(everyone) if name in scarce else own, found[name]
            assert got.tokens == want.tokens, matrix
            for part in ("gram", "mean_abs", "peak", "peak_mean_abs"):
                torch.testing.assert_close(getattr(got, part), getattr(want, part), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("effort", ["fast", "default"])
def test_matrices_of_few_experts_live_at_once(effort: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """While layers are solved there are the matrices of other layers, of the expert and of the mean of all."""
    tiny("mixtral", tmp_path / "model")
    made: list[weakref.ref[torch.Tensor]] = []
    empty, solve, most = LayerStatistics.empty, solving.solve_layer, 0

    def noted(*args: Any) -> LayerStatistics:
        found = empty(*args)
        made.append(weakref.ref(found.gram))
        return found

    def counted(problem: Any, *args: Any) -> Any:
        nonlocal most
        gc.collect()
        most = max(most, sum(gram() is not None for gram in made))
        return solve(problem, *args)

    gc.collect()
    gc.freeze()  # what the process holds already is not gone through again at every layer
    monkeypatch.setattr(LayerStatistics, "empty", noted)
    monkeypatch.setattr(solving, "solve_layer", counted)
    chosen = {"effort": effort} | ({} if effort == "fast" else {"steps": 2})
    given = options(tmp_path, method="lcq", calib_sequences=2, calib_length=16, method_options=chosen)
    try:
        report = quantize_model(tmp_path / "model", tmp_path / "out", given)
    finally:
        gc.unfreeze()
    of_attention = 2  # query, key and value share one
    assert len(made) > most
    assert most <= of_attention + 2
    assert sum(experts.matrix_of(name) is not None for name in report.layers) == 2 * 2 * 4


def test_experts_that_a_family_computes_by_itself_are_seen_by_matrix() -> None:
    """DBRX: each matrix is given what it is called with; an expert's rows are those that were sent to it."""
    from rankbook.calibration.model.adapter import adapter_of

    model = random_model("dbrx")
    make_plain(model)
    blocks, ids = adapter_of(model).blocks(), torch.arange(400).view(4, 100) % 250
    calls = capture.record_calls(model, blocks, ids)
    stream = capture.first_inputs(model, blocks, ids, torch.float32)
    one: Any = blocks.modules[0]
    mlp = one.ffn.experts.mlp
    names = [f"ffn.experts.mlp.{matrix}.{expert}" for matrix in ("w1", "v1", "w2") for expert in range(4)]
    given: dict[str, list[torch.Tensor]] = {name: [] for name in names}
    hooks = [
        one.get_submodule(name).register_forward_pre_hook(lambda _, args, name=name: given[name].append(args[0]))
        for name in names
    ]
    found = capture.collect(one, calls[0], stream.values, names)
    for hook in hooks:
        hook.remove()
    assert len(mlp.w1) == 4
    for name in names:
        x = torch.cat(given[name])
        assert len(x) >= x.shape[1], "no expert is filled up from the others"
        torch.testing.assert_close(found[name].gram, x.T @ x, rtol=1e-4, atol=1e-4)
    assert sum(len(torch.cat(given[name])) for name in names[:4]) == 2 * ids.numel()
