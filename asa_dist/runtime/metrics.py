"""Where a run's results go: metrics.jsonl, samples.jsonl, trained.jsonl, events.jsonl; one line for whoever watches.

wandb_log.py reads these files.
"""

from __future__ import annotations

import math
import sys
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TextIO

from torch import Tensor
from tqdm import tqdm

from asa_dist.config import MetricsConfig
from asa_dist.records import Prompt, RolloutGroup
from asa_dist.runtime.run_log import EVENT_LOG, STEP_LOGS, RunLog, event_row
from asa_dist.runtime.wandb_log import WandbProcess


class ProgressLine:
    """A live line in a terminal, plain lines otherwise: step, losses, speed, time left.

    Args:
        first_step: steps finished before; time left follows from the rate since then.
    """

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
        if "eval/margin" in values:
            self.say(
                f"step {values['step']:.0f}: held-out pairs of stage {values['udasa/stage']:.0f}: loss "
                f"{values['eval/loss']:.3f} margin {values['eval/margin']:+.3f} accuracy {values['eval/accuracy']:.2f}"
            )
        if not (text := _step_text(values)):
            return
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


def _step_text(values: dict[str, float]) -> str:
    """What a live line says of a step, of either method; empty for rows that are of no update."""
    if "loss/total" in values:
        text = (
            f"loss {values['loss/total']:.3f} mle {values['loss/mle']:.3f} align {values['loss/self_align']:+.3f} "
            f"τ {values['trust/tau']:.2f} β {values['trust/beta']:.1f}"
        )
    elif "udasa/loss" in values:
        text = (
            f"stage {values['udasa/stage']:.0f} loss {values['udasa/loss']:.3f} margin {values['udasa/margin']:+.3f} "
            f"accuracy {values['udasa/accuracy']:.2f}"
        )
    else:
        return ""
    return f"{text} {values['perf/tokens_per_second']:,.0f} tokens/s"


class RunRecorder:
    """Appends one JSON object per line; a killed run keeps what it had written.

    While lines cannot be written (disk full) they wait in memory and training goes on. ``event`` and ``sync`` may be
    called from any thread.

    Raises:
        OSError: a file cannot be opened.
    """

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
        self._logs = {name: RunLog(run_dir / f"{name}.jsonl") for name in (*STEP_LOGS, EVENT_LOG)}
        self._delayed: set[str] = set()  # logs whose rows wait
        self._delayed_lock = threading.Lock()
        self._wandb = WandbProcess(run_dir, config, progress.say) if config.wandb != "disabled" else None

    def _append(self, name: str, row: dict[str, Any]) -> None:
        self._tell_of_delay(name, self._logs[name].append(row))

    def _tell_of_delay(self, name: str, error: OSError | None) -> None:
        """Once when rows begin to wait, once when all are written."""
        with self._delayed_lock:
            had_delay = bool(self._delayed)
            (self._delayed.discard if error is None else self._delayed.add)(name)
            has_delay = bool(self._delayed)
        if error is not None and not had_delay:
            self._progress.say(
                f"asa: warning: {self._logs[name].path}: {error.strerror}: what cannot be written waits in memory; "
                "training goes on"
            )
        elif had_delay and not has_delay:
            self._progress.say(f"asa: {self._logs[name].path}: what waited in memory is written")

    def sync(self) -> bool:
        """Makes every line durable, as a checkpoint of the same step needs it; False if some cannot be written now."""
        is_durable = True
        for name, log in self._logs.items():
            error = log.sync()
            self._tell_of_delay(name, error)
            is_durable &= error is None
        return is_durable

    def event(self, name: str, /, **details: Any) -> None:
        """Adds to events.jsonl what happened to the run, with the time (UTC)."""
        self._append(EVENT_LOG, event_row(name, details))

    def say(self, message: str) -> None:
        """One line, or a few, for whoever watches."""
        self._progress.say(message)

    def metrics(self, values: dict[str, float]) -> None:
        # null: not finite, which JSON cannot say; a diagnostic may be so in a step whose update is sound
        self._append("metrics", {name: value if math.isfinite(value) else None for name, value in values.items()})
        self._progress.show(values)
        if self._wandb is not None:
            self._wandb.look()

    def trained(self, step: int, prompt_ids: list[int], skipped: bool = False) -> None:
        """The prompts that ``step`` used up; ``skipped``: without an update."""
        self._append("trained", {"step": step, "prompt_ids": prompt_ids} | ({"skipped": True} if skipped else {}))

    def skipped(self, step: int, reason: str, prompt_ids: list[int]) -> None:
        """A step without an update, and the prompts concerned, as far as they are known."""
        self.event("step_skipped", step=step, reason=reason, prompt_ids=prompt_ids)
        self._progress.say(f"asa: warning: step {step} made no update: {reason}")

    def samples(
        self, step: int, groups: Sequence[RolloutGroup], terms: Sequence[dict[str, Tensor]], tau: float
    ) -> None:
        """The first groups of this rank's first micro-batch, with every reward term."""
        num_groups = min(self._config.sample_groups, next(iter(terms[0].values())).shape[0])
        for place, group in enumerate(groups[:num_groups]):
            self._append(
                "samples",
                {
                    "step": step,
                    "prompt_id": group.prompt.prompt_id,
                    "tau": tau,
                    "prompt": self._decode(group.prompt.token_ids.tolist()),
                    "responses": [
                        {
                            **self._own_prompt(group.prompt, index),
                            "text": self._decode(response.token_ids.tolist()),
                            "finished": response.finished,
                            "version": response.oldest_version,
                            **{name: float(value_PG[place, index]) for name, value_PG in terms[0].items()},
                        }
                        for index, response in enumerate(group.responses)
                    ],
                },
            )

    def _own_prompt(self, prompt: Prompt, sibling: int) -> dict[str, str]:
        """The phrasing that a response answers, where there are several."""
        return {"prompt": self._decode(prompt.tokens_for(sibling).tolist())} if prompt.variants else {}

    def close(self) -> None:
        """Writes what waits; what still cannot be written is lost, and said."""
        self.sync()
        for log in self._logs.values():
            if log.num_pending:
                self._progress.say(f"asa: warning: {log.path}: {log.num_pending} lines could not be written")
            log.close()
        if self._wandb is not None:
            self._wandb.close()
        self._progress.close()


class SilentRecorder:
    """Ranks other than 0 write nothing."""

    def say(self, message: str) -> None: ...

    def metrics(self, values: dict[str, float]) -> None: ...

    def trained(self, step: int, prompt_ids: list[int], skipped: bool = False) -> None: ...

    def skipped(self, step: int, reason: str, prompt_ids: list[int]) -> None: ...

    def event(self, name: str, /, **details: Any) -> None: ...

    def sync(self) -> bool:
        return True

    def samples(
        self, step: int, groups: Sequence[RolloutGroup], terms: Sequence[dict[str, Tensor]], tau: float
    ) -> None: ...

    def close(self) -> None: ...
