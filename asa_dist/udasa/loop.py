"""One round's training, as a table of contents: stages of the curriculum one after the other, each a run of DPO steps.

    stage   its reference │ step │ step │ … │ step, held-out pairs │ …      until its last planned step, or what the
                                                                           held-out pairs show ends it early

The collaborators are arguments; this file knows no DeepSpeed, no Ray, no files. What happens between two steps, and to
one that is not finite, is the same for every method: asa/stepping.py. Adam's moments go on from stage to stage.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

from asa_dist.asa.objective import StepResult
from asa_dist.asa.packing import MicroBatch
from asa_dist.asa.step_time import StepTime, timed_evaluation
from asa_dist.asa.stepping import StepEngine, SteppedLoop, StepRecorder, of_another_version, part_of, require_usable
from asa_dist.config_udasa import CurriculumConfig, DpoConfig
from asa_dist.udasa.curriculum import StagePlan, Stopping
from asa_dist.udasa.objective import PairCounts, PairInputs


class Engine(StepEngine, Protocol):
    """The sharded model (runtime/engine.py)."""

    def train_step(
        self, batches: Sequence[MicroBatch], inputs: PairInputs, learning_rates: Mapping[str, float]
    ) -> StepResult: ...
    def evaluate(self, batches: Sequence[MicroBatch], inputs: PairInputs) -> dict[str, Tensor]: ...
    def collective_seconds(self) -> float: ...  # that this rank has been blocked in collectives, so far


class Pairs(Protocol):
    """This rank's share of any of the round's pairs, by prompt id (runtime/data/preferences.py)."""

    def train_batches(self, prompt_ids: Sequence[int]) -> list[MicroBatch]: ...
    def heldout_batches(self, prompt_ids: Sequence[int]) -> list[MicroBatch]: ...
    def compute_reference(self, name: str, prompt_ids: Sequence[int]) -> None: ...  # a collective, as the next one
    def load_reference(self, name: str, prompt_ids: Sequence[int]) -> None: ...


class Recorder(StepRecorder, Protocol):
    """Where results go."""

    def event(self, name: str, /, **details: Any) -> None: ...
    def say(self, message: str) -> None: ...


COUNTERS = ("tokens/rollout", "train/skipped_steps")


@dataclass(kw_only=True)
class UdasaLoop(SteppedLoop):
    """One rank's loop over a round's stages. A checkpoint is taken where one is due, and at the end of every stage.

    Its place is ``stage_index``, ``step_in_stage`` and ``stopping``; ``finished`` counts the steps of all stages.
    """

    stages: tuple[StagePlan, ...]  # of plan_curriculum, in the order in which they are trained
    curriculum: CurriculumConfig
    dpo: DpoConfig
    max_skipped_steps: int  # in a row; so many end the run
    engine: Engine
    pairs: Pairs
    recorder: Recorder
    stage_index: int = 0  # in ``stages``
    step_in_stage: int = 0  # finished ones
    stopping: Stopping = field(default_factory=Stopping)  # of this stage
    counters: dict[str, float] = field(default_factory=lambda: dict.fromkeys(COUNTERS, 0.0))

    @property
    def is_finished(self) -> bool:
        return self.stage_index == len(self.stages)

    def run(self) -> int:
        """Trains what is left of the round; ends early if any rank's ``stop_code`` says so.

        Returns:
            The largest stop code of all ranks. What was trained is in a checkpoint.

        Raises:
            TrainingError: on every rank; so is what ``pairs`` raises when a reference cannot be written or read.
        """
        stop = self._agreed_stop_code()
        if self.dpo.reference == "base" and not (stop or self.is_finished):
            self._provide_reference("base", self.stages, is_computed=self.finished > 0)
        while not (stop or self.is_finished):
            stop = self._train_stage(self.stages[self.stage_index])
        self._save_last()
        return stop

    # --- one stage ----------------------------------------------------------------------------------------------
    def _train_stage(self, plan: StagePlan) -> int:
        """From ``step_in_stage`` to the stage's end, or a request to stop; returns the stop code."""
        self._begin(plan)
        steps = plan.pairs_by_step(self.step_in_stage)
        stop = 0
        while not (ended := self._ended(plan)) and not stop:
            self._save_if_due()
            stop = self._step(plan, next(steps))
        if ended:
            self._end(plan, ended)
        return stop

    def _ended(self, plan: StagePlan) -> str:
        """Why the stage is over; "" = it is not."""
        if self.step_in_stage == plan.num_steps:
            return "all planned steps are done"
        return self.stopping.reason(self.curriculum.patience)

    def _begin(self, plan: StagePlan) -> None:
        self.recorder.event(
            "stage_started" if self.step_in_stage == 0 else "stage_resumed",
            step=self.finished, stage=plan.stage + 1, pairs=len(plan.train_ids), heldout_pairs=len(plan.heldout_ids),
            planned_steps=plan.num_steps,
        )
        if self.dpo.reference == "stage_start":
            self._provide_reference(f"stage-{plan.stage + 1}", [plan], is_computed=self.step_in_stage > 0)

    def _end(self, plan: StagePlan, reason: str) -> None:
        """On to the next stage; saved, so that the next one's reference can always be computed again."""
        num_steps, self.step_in_stage = self.step_in_stage, 0
        self.stage_index, self.stopping = self.stage_index + 1, Stopping()
        self.recorder.event("stage_finished", step=self.finished, stage=plan.stage + 1, steps=num_steps, reason=reason)
        self.recorder.say(
            f"step {self.finished}: stage {plan.stage + 1} ends after {num_steps} of {plan.num_steps} steps: {reason}"
        )
        self._save()

    def _provide_reference(self, name: str, plans: Iterable[StagePlan], is_computed: bool) -> None:
        """Of all pairs of the plans, from the weights as they are; from the file, once they have been trained on."""
        prompt_ids = [prompt_id for plan in plans for prompt_id in (*plan.train_ids, *plan.heldout_ids)]
        provide = self.pairs.load_reference if is_computed else self.pairs.compute_reference
        seconds = self._timed(lambda: provide(name, prompt_ids))
        self.recorder.metrics({"step": self.finished, "time/reference_seconds": seconds})

    # --- one step -----------------------------------------------------------------------------------------------
    def _step(self, plan: StagePlan, prompt_ids: list[int]) -> int:
        """Trains on the pairs; evaluates if it is time; returns the stop code."""
        spent = StepTime(self.engine.collective_seconds, parts=("data",))
        with spent.part("data"):
            batches = self.pairs.train_batches(prompt_ids)
        inputs = self._inputs(plan, batches)
        rates = {"psi": plan.learning_rate(self.step_in_stage)}
        result = self.engine.train_step(batches, inputs, rates)
        self.finished, self.step_in_stage = self.finished + 1, self.step_in_stage + 1
        sums = self._sums(result.sums)
        maxima, stop = self._maxima(result.maxima)
        counts = inputs.counts
        if not self._record(result, prompt_ids, {"tokens/rollout": counts.response_tokens}, self.max_skipped_steps):
            return stop
        times = spent.metrics()
        values = {
            "step": self.finished,
            **self.counters,
            "udasa/stage": plan.stage + 1,
            "udasa/pairs": counts.pairs,
            **{f"udasa/{name}": mean for name, mean in means(sums, counts).items()},
            **maxima,
            **self._speed_and_size(result, rates, times["time/step_seconds"], counts.response_tokens),
            **times,
        }
        is_last = self.step_in_stage == plan.num_steps
        if plan.heldout_ids and (is_last or self.step_in_stage % self.curriculum.eval_every_steps == 0):
            values |= timed_evaluation(lambda: self._evaluate(plan))
        self.recorder.metrics(values)
        return stop

    def _inputs(self, plan: StagePlan, batches: Sequence[MicroBatch]) -> PairInputs:
        """With the normalisers of all ranks: one all-reduce before the first forward."""
        local = torch.stack([PairCounts.of(batch.responses.length_PG) for batch in batches]).sum(0)
        counts = PairCounts(*self.engine.sum_over_ranks(local).tolist())
        return PairInputs(counts, self.dpo, self.dpo.kl_weight if plan.is_last else 0.0)

    def _evaluate(self, plan: StagePlan) -> dict[str, float]:
        """The stage's held-out pairs, and what they say about going on."""
        batches = self.pairs.heldout_batches(plan.heldout_ids)
        inputs = self._inputs(plan, batches)
        heldout = means(self._sums(self.engine.evaluate(batches, inputs)), inputs.counts)
        require_usable(heldout["loss"])
        self.stopping = self.stopping.after(heldout["loss"], heldout["margin"])
        return {f"eval/{name}": mean for name, mean in heldout.items()}

    # --- between two steps --------------------------------------------------------------------------------------
    def state_dict(self) -> dict[str, Tensor]:
        place = {"stage_index": self.stage_index, "step_in_stage": self.step_in_stage}
        return super().state_dict() | {
            **{f"place.{name}": torch.tensor(value) for name, value in place.items()},
            **{f"stopping.{name}": value for name, value in self.stopping.state_dict().items()},
        }

    def load_state_dict(self, finished: int, state: dict[str, Tensor]) -> None:
        place = part_of(state, "place")
        try:
            self.stage_index, self.step_in_stage = int(place["stage_index"]), int(place["step_in_stage"])
            self.stopping = Stopping.from_state_dict(part_of(state, "stopping"))
        except KeyError as error:
            raise of_another_version(finished, f"it lacks {error}") from None
        super().load_state_dict(finished, state)


def means(sums: Mapping[str, Tensor], counts: PairCounts) -> dict[str, float]:
    """loss (nats), margin and accuracy per pair, kl (nats) per response token, from ``preference_loss``'s sums.

    Args:
        sums: over all micro-batches and ranks.
    """
    return {
        "loss": float(sums["udasa/loss"]),
        "margin": float(sums["udasa/margin"]) / counts.pairs,
        "accuracy": float(sums["udasa/accuracy"]) / counts.pairs,
        "kl": float(sums["udasa/kl"]) / max(counts.response_tokens, 1.0),
    }
