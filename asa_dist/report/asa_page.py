"""What the page of an ASA run shows: perplexity, trust and the ledger at the top, samples with every reward term."""

from __future__ import annotations

from importlib.resources import files
from string import Template

from asa_dist.report.asa_charts import CHAPTERS, NOT_CHARTED, warmup
from asa_dist.report.asa_signs import asa_warnings
from asa_dist.report.charts import filled
from asa_dist.report.markup import number
from asa_dist.report.method_page import Figure, MethodPage, checkpoint_figure, training_minutes
from asa_dist.report.run_files import RunFiles
from asa_dist.report.samples import read_samples
from asa_dist.report.signs import WINDOW


def asa_page(run: RunFiles) -> MethodPage:
    samples = read_samples(lambda: run.rows("samples.jsonl"))
    section = Template((files("asa_dist.report") / "samples.html").read_text(encoding="utf-8"))
    without = "" if samples["groups"] else "<p>No responses have been sampled yet.</p>"
    return MethodPage(
        state=run.state,
        progress=f"step {run.last_step:,} of {run.setting('train.steps'):,}",
        figures=_figures(run),
        warnings=asa_warnings(run),
        chapters=filled(CHAPTERS, NOT_CHARTED, run),
        after_curves=section.substitute(without_samples=without),
        shading="Shaded: the warm-up, β = 0.",
        data={"warmup": warmup(run), "samples": samples},
    )


def _figures(run: RunFiles) -> list[Figure]:
    perplexity, bigram = run.curve("eval/perplexity").last(), run.curve("eval/bigram_perplexity").last()
    tau, speed = (run.curve(key).tail_mean(WINDOW) for key in ("trust/tau", "perf/tokens_per_second"))
    since = run.aligned_since
    return [
        Figure("held-out perplexity", number(perplexity), f"bigram model of the same tokens: {number(bigram)}",
               perplexity > bigram),
        Figure(f"trust τ, last {WINDOW} steps", number(tau), "agreement with R_intrinsic, not truth"),
        Figure("β > 0 since", "–" if since is None else f"step {since:,}",
               f"β = {run.setting('objective.beta'):g} after the warm-up"),
        Figure(f"tokens per second, last {WINDOW} steps", number(speed, 0), _trained(run)),
        _ledger(run),
        checkpoint_figure(run),
    ]  # fmt: skip


def _trained(run: RunFiles) -> str:
    corpus, rollout = run.curve("tokens/corpus").last(), run.curve("tokens/rollout").last()
    return f"{number(corpus, 0)} corpus and {number(rollout, 0)} rollout tokens in {training_minutes(run)}"


def _ledger(run: RunFiles) -> Figure:
    if run.inspection is None:
        return Figure("ledger", "unknown", "its file cannot be read", True)
    found = run.inspection.ledger
    is_bad = bool(found.lost or found.repeated)
    verdict = f"{len(found.lost):,} lost, {len(found.repeated):,} repeated" if is_bad else "nothing lost"
    more = f"{found.trained:,} trained on{'' if is_bad else ' once each'}, {found.skipped_steps:,} steps skipped"
    return Figure("ledger of prompts", verdict, more, is_bad)
