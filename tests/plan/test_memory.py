"""The planned bytes of a rank, against a real engine at every ZeRO stage."""

from __future__ import annotations

import pytest
from planner_bytes import BUCKET

from asa_dist.plan.memory import MODEL_STATES, buffers, model_states
from tests.asa import worlds
from tests.distributed.ranks import run_on_ranks
from tests.plan import engine_bytes

TOLERANCE = 0.10


def _bytes_planned(stage: int, dtype: str) -> dict[str, float]:
    config = engine_bytes.planned(stage, 2, dtype)
    tokenizer = config.data.tokenizer
    assert tokenizer.train is not None
    # fewer than a config may say; a copy, for a default is one object for all configs
    train = tokenizer.train.model_copy(update={"vocab_size": worlds.VOCAB})
    data = config.data.model_copy(update={"tokenizer": tokenizer.model_copy(update={"train": train})})
    config = config.model_copy(update={"data": data})
    # stages 1 and 2 give their bucket back at the end of a backward
    return model_states(config) | {BUCKET: buffers(config)[BUCKET] if stage == 3 else 0.0}


@pytest.mark.distributed
@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_planned_bytes_are_those_of_a_real_engine(dtype: str) -> None:
    for rank, found in enumerate(run_on_ranks(engine_bytes.bytes_by_stage, 2, dtype)):
        for stage, measured in found.items():
            planned = _bytes_planned(stage, dtype)
            wrong = {part: (planned[part], measured[part]) for part in (*MODEL_STATES, BUCKET)
                     if measured[part] != pytest.approx(planned[part], rel=TOLERANCE, abs=1)}  # fmt: skip
            assert not wrong, f"rank {rank}, stage {stage}, {dtype}: (planned, measured) {wrong}"
