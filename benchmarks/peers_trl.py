"""TRL's GRPO trainer, as `peers.py` runs it: in an environment of its own, with nothing of this project.

    PYTHON benchmarks/peers_trl.py FOLDER/case.json RUN

It writes what a run of ours writes, and `peers.py` looks at: RUN/trained.jsonl, a line with every step, and
RUN/metrics.jsonl, with where its time went. The trainer is TRL's, without what this does not need: float32 without
checkpointing, the whole batch in one forward, no reference model, a reward that costs nothing; one process with two
threads.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
from trl import GRPOConfig, GRPOTrainer


class StepTime:
    """Seconds of a step, by part; a part within another one counts for itself alone."""

    def __init__(self) -> None:
        self._open: list[str] = []
        self.begin()

    def begin(self) -> None:
        self._started = self._since = time.perf_counter()
        self.seconds: dict[str, float] = {}

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        self.enter(name)
        try:
            yield
        finally:
            self.leave()

    def enter(self, name: str) -> None:
        self._count()
        self._open.append(name)

    def leave(self) -> None:
        self._count()
        self._open.pop()

    def metrics(self) -> dict[str, float]:
        self._count()
        return {f"time/{name}_seconds": value
                for name, value in {"step": self._since - self._started, **self.seconds}.items()}

    def _count(self) -> None:
        """What has passed since the last call, for the innermost part that is open."""
        now = time.perf_counter()
        name = self._open[-1] if self._open else "other"
        self.seconds[name] = self.seconds.get(name, 0.0) + now - self._since
        self._since = now


class TimedTrainer(GRPOTrainer):
    """TRL's trainer; the methods are timed, not changed."""

    spent: StepTime
    response_tokens = 0  # since the start

    def _generate_single_turn(self, *arguments: Any, **keywords: Any) -> Any:
        with self.spent.part("generate"):
            completion_ids, logprobs = super()._generate_single_turn(*arguments, **keywords)
        self.response_tokens += sum(map(len, completion_ids))
        return completion_ids, logprobs

    def _generate_and_score_completions(self, inputs: Any) -> Any:
        with self.spent.part("score"):  # texts, rewards, advantages
            return super()._generate_and_score_completions(inputs)

    def compute_loss(self, *arguments: Any, **keywords: Any) -> Any:
        with self.spent.part("logprob"):  # one forward, and the loss
            return super().compute_loss(*arguments, **keywords)


class Journal(TrainerCallback):
    """Writes every step down as soon as it has ended, and times the optimizer."""

    def __init__(self, run_dir: Path, trainer: TimedTrainer) -> None:
        self._trained = (run_dir / "trained.jsonl").open("a", encoding="utf-8", buffering=1)
        self._metrics = (run_dir / "metrics.jsonl").open("a", encoding="utf-8", buffering=1)
        self._trainer = trainer

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **keywords: Any) -> None:
        self._trainer.spent.enter("optimizer")

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **keywords: Any) -> None:
        self._trainer.spent.leave()

    def on_step_end(self, args: Any, state: Any, control: Any, **keywords: Any) -> None:
        row = {"step": state.global_step, "tokens/rollout": self._trainer.response_tokens,
               **self._trainer.spent.metrics()}
        self._metrics.write(json.dumps(row) + "\n")
        self._trained.write(json.dumps({"step": state.global_step}) + "\n")
        self._trainer.spent.begin()


def reward(completions: list[str], **columns: Any) -> list[float]:
    """Of the same variance in every group, and for nothing."""
    return [float(number % 2) for number in range(len(completions))]


def build(case: dict[str, Any], run_dir: Path) -> TimedTrainer:
    prompts = [json.loads(line) for line in Path(case["prompt_file"]).read_text(encoding="utf-8").splitlines()]
    trainer = TimedTrainer(
        AutoModelForCausalLM.from_pretrained(case["model"], dtype=torch.float32), reward,
        GRPOConfig(
            str(run_dir / "trl"), max_steps=case["steps"], seed=case["seed"], use_cpu=True, bf16=False,
            gradient_checkpointing=False, per_device_train_batch_size=case["prompts_per_step"] * case["group_size"],
            num_generations=case["group_size"], max_completion_length=case["response_tokens"], temperature=1.0,
            beta=0.0, learning_rate=case["learning_rate"], lr_scheduler_type="constant", save_strategy="no",
            report_to="none", disable_tqdm=True, dataloader_pin_memory=False),
        Dataset.from_list(prompts), processing_class=AutoTokenizer.from_pretrained(case["model"]))
    trainer.spent = StepTime()
    backward = trainer.accelerator.backward

    def timed_backward(*arguments: Any, **keywords: Any) -> None:
        with trainer.spent.part("backward"):
            backward(*arguments, **keywords)

    trainer.accelerator.backward = timed_backward
    trainer.add_callback(Journal(run_dir, trainer))
    return trainer


def main() -> None:
    case, run_dir = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8")), Path(sys.argv[2])
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    run_dir.mkdir(parents=True, exist_ok=True)
    trainer = build(case, run_dir)
    trainer.spent.begin()
    trainer.train()


if __name__ == "__main__":
    main()
