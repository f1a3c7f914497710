"""Where a run's results go: metrics.jsonl, samples.jsonl, trained.jsonl and one line for whoever watches."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TextIO

from torch import Tensor
from tqdm import tqdm

from asa_dist.config import MetricsConfig
from asa_dist.records import RolloutGroup


class ProgressLine:
    """A live line in a terminal, plain lines otherwise: step, losses, τ, tokens/s, time left."""

    def __init__(self, num_steps: int, first_step: int, stream: TextIO = sys.stderr, plain_every_seconds: float = 10.0):
        self._stream = stream
        self._num_steps, self._first_step = num_steps, first_step
        self._started = time.monotonic()
        self._last_plain = float("-inf")
        self._plain_every_seconds = plain_every_seconds
        self._bar = (
            tqdm(total=num_steps, initial=first_step, file=stream, unit="step", dynamic_ncols=True)
            if stream.isatty()
            else None
        )

    def show(self, values: dict[str, float]) -> None:
        if "eval/perplexity" in values:
            self.say(
                f"step {values['step']:.0f}: held-out perplexity {values['eval/perplexity']:.2f}, "
                f"bigram model of the same tokens {values['eval/bigram_perplexity']:.2f}"
            )
        if "loss/total" not in values:
            return
        text = (
            f"loss {values['loss/total']:.3f} mle {values['loss/mle']:.3f} align {values['loss/self_align']:+.3f} "
            f"τ {values['trust/tau']:.2f} β {values['trust/beta']:.1f} {values['perf/tokens_per_second']:,.0f} tokens/s"
        )
        if self._bar is not None:
            self._bar.set_postfix_str(text, refresh=False)
            self._bar.update(int(values["step"]) - self._bar.n)
            return
        now, step = time.monotonic(), int(values["step"])
        if now - self._last_plain >= self._plain_every_seconds or step == self._num_steps:
            self._last_plain = now
            left_seconds = (now - self._started) / max(1, step - self._first_step) * (self._num_steps - step)
            self.say(f"step {step}/{self._num_steps} {text} {tqdm.format_interval(left_seconds)} left")

    def say(self, message: str) -> None:
        """One line, above the live one."""
        if self._bar is not None:
            self._bar.write(message, file=self._stream)
        else:
            print(message, file=self._stream, flush=True)

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()


LARGEST_ON_POLICY_DIFFERENCE = 0.1  # nats: the same weights, so only rounding may differ
STEPS_BETWEEN_WARNINGS = 100


class RunRecorder:
    """Appends one JSON object per line; every line is flushed, so that a killed run keeps what it had written."""

    def __init__(
        self,
        run_dir: Path,
        config: MetricsConfig,
        decode: Callable[[Sequence[int]], str],
        progress: ProgressLine,
    ):
        self._config = config
        self._decode = decode
        self._progress = progress
        self._next_warning_step = 0.0
        self._files = {
            name: (run_dir / f"{name}.jsonl").open("a", encoding="utf-8") for name in ("metrics", "samples", "trained")
        }

    def _append(self, name: str, value: dict[str, Any]) -> None:
        file = self._files[name]
        file.write(json.dumps(value, ensure_ascii=False, allow_nan=False) + "\n")
        file.flush()

    def metrics(self, values: dict[str, float]) -> None:
        self._append("metrics", values)
        self._progress.show(values)
        self._warn_of_disagreement(values)

    def _warn_of_disagreement(self, values: dict[str, float]) -> None:
        """Rollouts of the very weights that are trained must have the trainer's log-probabilities."""
        if "rollout/max_abs_dlogp" not in values or values["rollout/policy_age_max"] > 0:
            return
        difference, step = values["rollout/max_abs_dlogp"], values["step"]
        if difference > LARGEST_ON_POLICY_DIFFERENCE and step >= self._next_warning_step:
            self._next_warning_step = step + STEPS_BETWEEN_WARNINGS
            self._progress.say(
                f"asa: warning: step {step:.0f}: trainer and rollout engine disagree about log-probabilities of the "
                f"same weights, by up to {difference:.2g} nats (rollout/max_abs_dlogp); likely causes: the rounding of "
                "model.dtype bfloat16 (try float32), or another attention implementation in the workers (set "
                "model.attention)"
            )

    def trained(self, step: int, prompt_ids: list[int]) -> None:
        self._append("trained", {"step": step, "prompt_ids": prompt_ids})

    def samples(
        self, step: int, groups: Sequence[RolloutGroup], terms: Sequence[dict[str, Tensor]], tau: float
    ) -> None:
        """The first groups of this rank's first micro-batch, with every reward term."""
        for place, group in enumerate(
            groups[: min(self._config.sample_groups, next(iter(terms[0].values())).shape[0])]
        ):
            self._append(
                "samples",
                {
                    "step": step,
                    "prompt_id": group.prompt.prompt_id,
                    "tau": tau,
                    "prompt": self._decode(group.prompt.token_ids.tolist()),
                    "responses": [
                        {
                            "text": self._decode(response.token_ids.tolist()),
                            "finished": response.finished,
                            "version": response.oldest_version,
                            **{name: float(value_PG[place, index]) for name, value_PG in terms[0].items()},
                        }
                        for index, response in enumerate(group.responses)
                    ],
                },
            )

    def close(self) -> None:
        for file in self._files.values():
            file.close()
        self._progress.close()


class SilentRecorder:
    """Ranks other than 0 write nothing."""

    def metrics(self, values: dict[str, float]) -> None: ...

    def trained(self, step: int, prompt_ids: list[int]) -> None: ...

    def samples(
        self, step: int, groups: Sequence[RolloutGroup], terms: Sequence[dict[str, Tensor]], tau: float
    ) -> None: ...

    def close(self) -> None: ...
