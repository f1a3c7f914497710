"""What the ranks of test_engine.py run. As a program: writes a new golden step."""

from __future__ import annotations

import json
from pathlib import Path

import torch

from asa_dist.runtime.engine import Placement, TrainEngine
from asa_dist.runtime.model import PHI, PSI, XI
from tests.distributed import tiny
from tests.distributed.ranks import run_on_ranks

GOLDEN = Path(__file__).parent / "golden_step.json"
NO_UPDATE = {PSI: 0.0, PHI: 0.0, XI: 0.0}


def _generator(engine: TrainEngine) -> torch.Tensor:
    return torch.cat([piece.detach().clone() for piece in engine.generator_shards()])


def clipped_updates(placement: Placement) -> dict[int, tuple[float, float, float]]:
    """By stage: size of ψ's update with head losses as they are and 100 times as large, and φ's norm then."""
    return {stage: _clipped_updates(placement, stage) for stage in (0, 1, 2, 3)}


def _clipped_updates(placement: Placement, stage: int) -> tuple[float, float, float]:
    sizes, norm = [], 0.0
    for weight in (1.0, 100.0):
        # a large ε makes Adam's update proportional to the gradient; otherwise it would hide any scaling
        settings = tiny.config(
            stage,
            placement.num_ranks,
            optimizer__clip_norm=0.2,
            optimizer__adam_eps=1.0,
            optimizer__weight_decay=0.0,
            objective={
                "embedding_loss_weight": weight,
                "indicator_loss_weight": weight,
                "principle_loss_weight": weight,
            },
        )
        engine = tiny.engine(tiny.model(settings), settings, placement)
        before = _generator(engine)
        result = engine.train_step(
            tiny.micro_batches(placement.num_ranks, placement.rank, 1), tiny.inputs(), {PSI: 0.1, PHI: 0.1, XI: 0.1}
        )
        sizes.append(float(engine.sum_over_ranks((_generator(engine) - before).square().sum()).sqrt()))
        norm = result.gradient_norms[PHI]
        engine.engine.destroy()
    return sizes[0], sizes[1], norm


def golden_step(placement: Placement) -> dict[str, float]:
    """Every scalar of one step at stage 3, and the loss after it."""
    settings = tiny.config(3, placement.num_ranks, optimizer__clip_norm=1.0)
    engine = tiny.engine(tiny.model(settings), settings, placement)
    batches = tiny.micro_batches(placement.num_ranks, placement.rank, 1)
    result = engine.train_step(batches, tiny.inputs(), {PSI: 1e-2, PHI: 1e-2, XI: 1e-2})
    values = {name: float(engine.sum_over_ranks(value)) for name, value in result.sums.items() if value.numel() == 1}
    values |= {f"grad_norm/{part}": norm for part, norm in result.gradient_norms.items()}
    again = engine.train_step(batches, tiny.inputs(), NO_UPDATE)
    values["loss/total after the step"] = float(engine.sum_over_ranks(again.sums["loss/total"]))
    engine.engine.destroy()
    return values


if __name__ == "__main__":
    text = json.dumps(dict(sorted(run_on_ranks(golden_step, 2)[0].items())), indent=1)
    GOLDEN.write_text(f"{text}\n", encoding="utf-8")  # stdout has DeepSpeed's messages
