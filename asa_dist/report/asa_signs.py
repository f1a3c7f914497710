"""Known bad signs of an ASA run.

What a value fell from is its mean over the last WINDOW steps before alignment began (β > 0), or over the first ones if
it began earlier: learning language changes lengths and entropy, too, and that is no fault.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

from asa_dist.report.run_files import RunFiles
from asa_dist.report.signs import WINDOW, Sign

SMALLEST_SPREAD = 0.25  # of the distinctness that G siblings can have
SHORTER = 0.5  # length at the end, relative to what it fell from
LEAST_ENTROPY = 0.1  # nats per token
LESS_ENTROPY = 0.2  # relative to what it fell from
LEAST_TRUST = 0.01
WORSE = 1.1  # perplexity at the end, relative to the best


def _fall(run: RunFiles, key: str) -> tuple[float, float]:
    """Mean before alignment, mean at the end; NaN, NaN if the run is too short to tell, or never aligned."""
    curve, since = run.curve(key), run.aligned_since
    if since is None or len(curve) < 2 * WINDOW or run.last_step - since < WINDOW:
        return math.nan, math.nan
    return curve.mean_before(since, WINDOW), curve.tail_mean(WINDOW)


def baseline(run: RunFiles) -> Iterator[str]:
    perplexity, bigram = run.curve("eval/perplexity").last(), run.curve("eval/bigram_perplexity").last()
    if run.state == "finished" and perplexity > bigram:
        yield (
            f"A bigram model counted on the same tokens predicts held-out text better: perplexity {bigram:,.2f} "
            f"against {perplexity:,.2f}. The model has learned little language yet: train longer before judging "
            "alignment."
        )


def perplexity_rises(run: RunFiles) -> Iterator[str]:
    curve = run.curve("eval/perplexity")
    best = min((value for value in curve.values if not math.isnan(value)), default=math.nan)
    if curve.last() > WORSE * best:
        yield (
            f"Held-out perplexity rose from {best:,.2f} to {curve.last():,.2f}: the model overfits, or alignment costs "
            "it language (lower objective.beta)."
        )


def responses_alike(run: RunFiles) -> Iterator[str]:
    size = run.setting("rollout.responses_per_prompt")
    before, now = (share * size for share in _fall(run, "rollout/distinct_fraction"))
    if now < 1 + SMALLEST_SPREAD * (size - 1) and now < before / 2:
        yield (
            f"Siblings repeat each other: of {size} responses to a prompt {now:.1f} differ, {before:.1f} did before "
            "alignment began. The model becomes certain, which is not the same as better (rollout/distinct_fraction)."
        )


def responses_shrink(run: RunFiles) -> Iterator[str]:
    before, now = _fall(run, "rollout/length_mean")
    if now < SHORTER * before:
        yield (
            f"Responses shrink: {now:.1f} tokens on average, {before:.1f} before alignment began. To say little and to "
            "end at once can be a way to score: look at the samples; a smaller objective.beta helps "
            "(rollout/length_mean)."
        )


def entropy_collapses(run: RunFiles) -> Iterator[str]:
    before, now = _fall(run, "rollout/entropy")
    if now < LEAST_ENTROPY and now < LESS_ENTROPY * before:
        yield (
            f"Entropy collapses: {now:.2g} nats per token, {before:.2g} before alignment began: there is hardly "
            "anything left to choose between (rollout/entropy)."
        )


def no_trust(run: RunFiles) -> Iterator[str]:
    earns = run.setting("evaluator.trust") == "earned"
    if earns and run.aligned_since is not None and run.last_step - run.aligned_since >= WINDOW:
        tau = run.curve("trust/tau").tail_mean(WINDOW)
        if tau < LEAST_TRUST:
            yield (
                f"τ is {tau:.2f} at the end: the learned reward does not agree with R_intrinsic, which alone steers "
                "the model (trust/tau)."
            )


def never_aligned(run: RunFiles) -> Iterator[str]:
    if run.state == "finished" and len(run.curve("trust/beta")) and run.aligned_since is None:
        key = "evaluator.max_warmup_steps" if run.setting("objective.beta") else "objective.beta"
        yield (
            "β was 0 in every step: this run trained a language model and an evaluator, and aligned nothing "
            f"({key} = {run.setting(key)})."
        )


SIGNS: tuple[Sign, ...] = (
    responses_alike, responses_shrink, entropy_collapses, no_trust, never_aligned, perplexity_rises, baseline,
)


def asa_warnings(run: RunFiles) -> list[str]:
    """Beside those of every run."""
    return [text for sign in SIGNS for text in sign(run)]
