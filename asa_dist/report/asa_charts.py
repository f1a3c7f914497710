"""The charts of an ASA run: which metrics stand together, and what a healthy run looks like in them."""

from __future__ import annotations

from asa_dist.report.charts import Chapter, Chart
from asa_dist.report.run_files import RunFiles

CHAPTERS = (
    Chapter("Does it learn language?", (
        Chart("Held-out perplexity", ("eval/perplexity", "eval/bigram_perplexity"), "perplexity", log=True,
              is_noisy=False,
              note="Healthy: falls below the bigram model of the same tokens and goes on falling. Bad sign: it rises "
              "again, above all once alignment has begun."),
        Chart("Language-model loss", ("loss/mle", "loss/total"), "nats",
              note="Healthy: loss/mle falls steadily; loss/total follows it, weighted, with a step where alignment "
              "begins. Bad sign: a jump that does not heal."),
    )),
    Chapter("Does it align?", (
        Chart("Trust τ", ("trust/rho", "trust/tau"), "rank correlation", from_zero=True, is_noisy=False,
              note="Healthy: rises during the warm-up (shaded: β = 0) and stays well above 0. Bad sign: 0, so that the "
              "learned reward steers nothing. τ measures agreement with R_intrinsic, not truth."),
        Chart("Rewards", ("reward/self", "reward/intrinsic", "reward/logic", "reward/fact", "reward/behav"), "reward",
              note="Healthy: slow growth, R_self and R_intrinsic close to each other. Bad sign: a fast climb while "
              "length, entropy or distinct responses fall: the reward is being gamed."),
        Chart("Weights ω of the self-reward", ("omega/logic", "omega/fact", "omega/behav"), "weight", is_noisy=False,
              range=(0, 1),
              note="Healthy: they drift slowly and sum to 1. Bad sign: two of them at evaluator.omega_floor, so that "
              "one term is the whole self-reward."),
        Chart("Alignment loss", ("loss/self_align",), "nats, unweighted",
              note="Healthy: noise around a level that moves slowly; its value says little. Bad sign: it runs away to "
              "ever larger values."),
        Chart("Losses of the evaluator", ("loss/heads", "loss/meta"), "unweighted", log=True,
              note="Healthy: loss/heads falls, loss/meta stays small: the heads learn what can be measured. Bad sign: "
              "both rise together."),
        Chart("Spread of the reward used", ("reward/used",), "standard deviations", from_zero=True,
              note="Healthy: clearly above 0: siblings differ, so that there is something to prefer. Bad sign: towards "
              "0, where siblings all get the same reward."),
    )),
    Chapter("What do responses look like?", (
        Chart("Response length", ("rollout/length_mean",), "tokens", from_zero=True,
              note="Healthy: settles at what the prompts ask for. Bad sign: shrinks to a few tokens after alignment "
              "has begun, or grows to rollout.max_new_tokens."),
        Chart("Entropy", ("rollout/entropy",), "nats per token", from_zero=True,
              note="Healthy: falls with the language-model loss and levels off. Bad sign: close to 0: the model is "
              "certain of everything, right or wrong."),
        Chart("Shares of responses",
              ("rollout/distinct_fraction", "rollout/truncated_fraction", "rollout/empty_fraction"), "share",
              range=(-0.03, 1.03),
              note="Healthy: most siblings are distinct, truncation falls as the model learns to end. Bad sign: "
              "distinct falls towards 1/G (all alike), or empty rises."),
    )),
    Chapter("Are updates sound?", (
        Chart("Gradient norms before clipping", ("grad_norm/psi", "grad_norm/phi", "grad_norm/xi"), "norm", log=True,
              note="Healthy: a narrow band after the first steps. Bad sign: spikes that come more and more often; each "
              "part is clipped at optimizer.clip_norm on its own."),
        Chart("Trainer against sampler", ("rollout/mismatch_kl", "rollout/max_abs_dlogp"), "nats", log=True,
              note="Healthy: tiny at policy age 0, a small constant at a larger age. Bad sign: above 0.1 at age 0 "
              "(they disagree about the same weights), or growth at a larger one: the event rollout_mismatch, above "
              "rollout.mismatch_kl_bound."),
        Chart("Off-policy weights", ("rollout/importance_mean", "rollout/clipped_fraction"), "weight; share of tokens",
              note="Healthy: the mean weight near 1, few tokens at the cap. Bad sign: more than a tenth of the tokens "
              "capped: rollouts are too old for these learning rates."),
        Chart("Policy age", ("rollout/policy_age_max", "rollout/policy_age_mean"), "steps", from_zero=True,
              is_noisy=False,
              note="Healthy: between 0 and rollout.max_policy_age. Bad sign: always at the bound while training waits "
              "for rollouts: workers are too slow."),
        Chart("Learning rates", ("lr/psi", "lr/phi", "lr/xi"), "per step", log=True, is_noisy=False,
              note="Healthy: the schedule you meant. Bad sign: the run ends within the warm-up."),
        Chart("Skipped steps", ("train/skipped_steps",), "steps since the start", from_zero=True, is_noisy=False,
              note="Healthy: 0. Bad sign: each step up is a loss or gradient that was not finite."),
    )),
    Chapter("Is it fast?", (
        Chart("Throughput", ("perf/tokens_per_second",), "tokens per second, all ranks", from_zero=True,
              note="Healthy: flat. Bad sign: a lasting fall; compare with the waiting time beside it."),
        Chart("Step time", ("time/step_seconds", "time/wait_rollout_seconds", "time/publish_seconds",
                            "time/checkpoint_seconds"), "seconds", log=True,
              note="Healthy: waiting and publishing are a small part of a step. Bad sign: waiting takes most of it: "
              "more workers, or a larger rollout.max_policy_age."),
        Chart("Memory of the largest rank", ("memory/peak_bytes",), "bytes", from_zero=True, is_noisy=False,
              note="Healthy: flat after the first steps. Bad sign: it grows for as long as the run lasts."),
        Chart("Tokens trained on", ("tokens/corpus", "tokens/rollout"), "tokens since the start", is_noisy=False,
              note="Healthy: straight lines. Bad sign: rollout tokens flatten: responses get shorter."),
    )),
    Chapter("What the theorems speak of", (
        Chart("Variance of the gradient estimate", tuple(f"theory/gradient_variance/{part}" for part in
                                                         ("psi", "phi", "xi")), "squared norm", log=True,
              note="Healthy: bounded (Theorem 1 assumes it). Bad sign: it grows without end: larger batches, or "
              "smaller learning rates."),
        Chart("Largest |R|", ("theory/reward_max",), "reward", from_zero=True,
              note="Healthy: at most 1, R_max of the theorems. Bad sign: above it: a bug."),
        Chart("Lipschitz estimate of R in φ", ("theory/lipschitz_phi",), "reward per unit of φ", log=True,
              note="Healthy: bounded. Bad sign: it grows: small updates of the evaluator turn rewards over."),
    )),
)  # fmt: skip
NOT_CHARTED = {"trust/beta", "trust/valid_groups"}  # shading of τ; a count that rewards and shares already show


def warmup(run: RunFiles) -> dict[str, int | None] | None:
    """The steps with β = 0 before alignment; "to": the first step with β > 0, None: not yet. None: there were none."""
    beta = run.curve("trust/beta")
    if not len(beta) or run.aligned_since == beta.steps[0]:
        return None
    return {"from": beta.steps[0], "to": run.aligned_since, "last": run.last_step}
