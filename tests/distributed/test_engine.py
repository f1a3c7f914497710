"""The engine's own promises: clipping by part, a golden step."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest

from tests.distributed.engine_cases import GOLDEN, clipped_updates, golden_step
from tests.distributed.ranks import run_on_ranks


@pytest.mark.distributed
def test_a_spike_in_a_head_does_not_shrink_the_generators_step() -> None:
    for stage, (plain, spiked, phi_norm) in run_on_ranks(clipped_updates, 2)[0].items():
        assert phi_norm > 20, f"stage {stage}: the spike should dominate a global norm"
        assert abs(spiked / plain - 1) <= 0.05, f"stage {stage}: ψ's update changed from {plain:.3e} to {spiked:.3e}"


@pytest.mark.distributed
def test_golden_step() -> None:
    found = run_on_ranks(golden_step, 2)[0]
    wanted: dict[str, Any] = json.loads(GOLDEN.read_text(encoding="utf-8"))
    wrong = [
        f"  {name}: was {wanted.get(name)}, is now {found.get(name)}"
        for name in sorted(found.keys() | wanted.keys())
        if name not in found
        or name not in wanted
        or not math.isclose(found[name], wanted[name], rel_tol=2e-4, abs_tol=2e-6)
    ]
    assert not wrong, (
        "one fused step of the tiny model no longer yields what it did:\n"
        + "\n".join(wrong)
        + "\nA refactoring must not change these numbers. If the mathematics was meant to change, say so in the "
        "commit and write the new ones:\n  python -m tests.distributed.engine_cases"
    )
