"""Do rollouts come from the policy that is trained? The guard over ``rollout/mismatch_kl``: plain bookkeeping.

    agree ──kl > bound──► counting ──patience_steps in a row──► rollout.on_mismatch    what the loop does
      ▲                      │                                   warn       says so, again every 100 steps
      └──────kl ≤ bound──────┘                                   fall_back  engine hf from now on; if it is that: stop
                                                                 stop       saves and ends the run

At policy age 0 the weights are the same, so that a single large difference is said, too. All numbers are those of the
whole step, the same on every rank: all ranks decide alike. Steps without an update neither count nor start anew.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from asa_dist.config import ModelConfig, RolloutConfig

LARGEST_ON_POLICY_DIFFERENCE = 0.1  # nats, of one log-probability: only rounding may differ
LARGEST_ROUNDING_KL = 0.01  # nats per token; bfloat16 gives less
STEPS_BETWEEN_WARNINGS = 100

Action = Literal["warn", "fall_back", "stop"]


@dataclass(frozen=True)
class Mismatch:
    """What has to be told, and done."""

    action: Action
    headline: str  # one line
    causes: tuple[str, ...]  # the likeliest first
    consequence: str
    event: dict[str, Any]  # details of `rollout_mismatch`

    @property
    def message(self) -> str:
        causes = [f"  {number}. {cause}" for number, cause in enumerate(self.causes, start=1)]
        likely = "  Likely causes, the likeliest first:"
        return "\n".join([f"asa: warning: {self.headline}", likely, *causes, f"  {self.consequence}"])


class MismatchGuard:
    """See the module. It starts anew with every start of a run, as the engine does.

    Args:
        rollout: ``mismatch_kl_bound``, ``mismatch_patience_steps``, ``on_mismatch``, and how rollouts are made.
        model: how the trainer computes them.
        engine: what `rollout.engine` means; the same on every rank.
    """

    def __init__(self, rollout: RolloutConfig, model: ModelConfig, engine: Literal["hf", "vllm"]) -> None:
        self._rollout, self._model = rollout, model
        self._is_hf = engine == "hf"
        self._steps_in_a_row = 0
        self._first_step = 0  # before it, rollouts may be those of the engine before
        self._next_warning_step = 0

    def look(self, values: Mapping[str, float]) -> Mismatch | None:
        """After a step with these metrics; what is to be done, if anything. Not finite counts as above the bound."""
        step, rollout = int(values["step"]), self._rollout
        if step < self._first_step:
            return None
        is_above = not values["rollout/mismatch_kl"] <= rollout.mismatch_kl_bound
        self._steps_in_a_row = self._steps_in_a_row + 1 if is_above else 0
        lasts = self._steps_in_a_row >= rollout.mismatch_patience_steps
        begins = self._steps_in_a_row == rollout.mismatch_patience_steps
        if not (begins or (step >= self._next_warning_step and (lasts or _differs_on_policy(values)))):
            return None
        self._next_warning_step = step + STEPS_BETWEEN_WARNINGS
        found = self._describe(values, self._action() if lasts else "warn", lasts=lasts)
        if found.action == "fall_back":
            self._is_hf, self._steps_in_a_row = True, 0
            self._first_step = step + rollout.max_policy_age + 2  # so many steps were under way
        return found

    def _action(self) -> Action:
        wanted = self._rollout.on_mismatch
        return "stop" if wanted == "fall_back" and self._is_hf else wanted

    def _describe(self, values: Mapping[str, float], action: Action, *, lasts: bool) -> Mismatch:
        rollout, step, age = self._rollout, int(values["step"]), int(values["rollout/policy_age_max"])
        kl, difference = values["rollout/mismatch_kl"], values["rollout/max_abs_dlogp"]
        weights = "the same weights" if age == 0 else f"weights up to {age} step(s) old"
        figures = f"rollout/max_abs_dlogp is {difference:.2g} nats, with {weights}"
        if lasts:
            figures = (
                f"rollout/mismatch_kl is {kl:.2g} nats per token, for {self._steps_in_a_row} step(s) in a row above "
                f"rollout.mismatch_kl_bound = {rollout.mismatch_kl_bound:g}; {figures}"
            )
        event = {
            "step": step, "mismatch_kl": _for_json(kl), "bound": rollout.mismatch_kl_bound,
            "steps_in_a_row": self._steps_in_a_row, "max_abs_dlogp": _for_json(difference), "policy_age": age,
            "action": action,
        }
        return Mismatch(
            action, f"step {step}: trainer and rollout engine disagree about log-probabilities: {figures}",
            tuple(self._causes(values)), self._consequence(action) if lasts else "training goes on", event,
        )

    def _consequence(self, action: Action) -> str:
        wanted = self._rollout.on_mismatch
        match action:
            case "warn":
                then = "training goes on"
            case "fall_back":
                then = "new workers with engine hf, the trainer's own model; if that does not help, the run stops"
            case "stop":
                then = "the run stops" + (", as the engine is hf already" if wanted == "fall_back" else "")
        return f"rollout.on_mismatch = {wanted}: {then}"

    def _causes(self, values: Mapping[str, float]) -> list[str]:
        rollout, model = self._rollout, self._model
        causes = []
        if values["rollout/policy_age_max"] > 0:
            causes.append("weights that change too fast for their age: lower optimizer.lr_psi or rollout.max_policy_age"
                          " (with 0 this cause is out of the question)")
        explained = (2 * values["rollout/max_abs_dlogp"] / rollout.temperature) ** 2  # generously
        if rollout.temperature != 1 and values["rollout/mismatch_kl"] > explained:
            causes.append(f"another meaning of rollout.temperature = {rollout.temperature:g} in the engine: at "
                          "temperature 1 (rollout/max_abs_dlogp) they agree better")
        if not self._is_hf:
            causes.append("weights in the engine that are not the published ones, or a cache of older ones "
                          "(rollout.engine=hf has neither)")
            causes.append("a version of vLLM that is not the one of asa-dist[vllm]")
            if rollout.top_p < 1 or rollout.top_k > 0 or rollout.min_p > 0:
                causes.append("log-probabilities after truncation (rollout.top_p, top_k, min_p) in the engine; those "
                              "before it are meant")
        causes.append(f"another attention implementation in the workers (set model.attention, now {model.attention})")
        if self._is_hf:
            causes.append("other versions of torch or transformers on the workers' hosts")
        if model.dtype == "bfloat16":
            is_likely = values["rollout/mismatch_kl"] <= LARGEST_ROUNDING_KL
            causes.insert(0 if is_likely else len(causes), "the rounding of model.dtype bfloat16 (try float32)")
        return causes


def _for_json(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _differs_on_policy(values: Mapping[str, float]) -> bool:
    """Whether rollouts of the very weights that are trained have other log-probabilities than the trainer's."""
    is_on_policy = values["rollout/policy_age_max"] == 0
    return is_on_policy and not values["rollout/max_abs_dlogp"] <= LARGEST_ON_POLICY_DIFFERENCE
