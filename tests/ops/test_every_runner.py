"""Every runner computes every operator that it takes as the numpy reference does, within its own bound."""

from __future__ import annotations

import pytest

from tests.ops import runners

PAIRS = [(runner.name, case) for runner in runners.RUNNERS.values() for case in runner.cases]


@pytest.mark.parametrize(("name", "case"), PAIRS, ids=[f"{name}: {case}" for name, case in PAIRS])
def test_it_computes_the_reference(name: str, case: str) -> None:
    runner = runners.RUNNERS[name]
    if missing := runner.missing():
        pytest.skip(missing)
    runners.check(runner, runners.drawn(runner.cases[case]))
