"""The charts of a round of UDASA: which metrics stand together, how differences are spread, and what is healthy."""

from __future__ import annotations

from typing import Any

from asa_dist.report.charts import Chapter, Chart, filled
from asa_dist.report.curves import rounded
from asa_dist.report.run_files import RunFiles
from asa_dist.report.udasa_round import RoundFiles

CHAPTERS = (
    Chapter("Does it learn the preference?", (
        Chart("Preference loss", ("udasa/loss", "eval/loss"), "nats; of ipo: squared",
              note="Healthy: both fall from where the stage begins (ln 2 with the sigmoid loss and a reference of the "
              "stage's start). Bad sign: the held-out loss rises while the other falls: pairs are learned by heart."),
        Chart("Reward margin", ("udasa/margin", "eval/margin"), "nats, times β", from_zero=True,
              note="Healthy: rises from 0 in every stage, less in later ones, whose pairs differ less. Bad sign: it "
              "stays at 0, or the held-out margin falls behind for good."),
        Chart("Accuracy", ("udasa/accuracy", "eval/accuracy"), "share of pairs with a margin above 0",
              range=(-0.03, 1.03),
              note="Healthy: clearly above a half, more so in the first stage. Bad sign: a half, of those held out: "
              "nothing was learned that holds for other prompts."),
        Chart("KL to the reference", ("udasa/kl", "eval/kl"), "nats per response token", from_zero=True,
              note="Healthy: grows slowly. Bad sign: it runs away: a larger udasa.dpo.beta, or smaller learning rates. "
              "What this estimate is of, and where it is biased, stands under Curriculum."),
    )),
    Chapter("Are updates sound?", (
        Chart("Learning rate", ("lr/psi",), "per step", from_zero=True, is_noisy=False,
              note="Healthy: each stage warms up, stays and decays; an early stop leaves the decay out. Bad sign: a "
              "stage ends within its warm-up."),
        Chart("Gradient norm before clipping", ("grad_norm/psi",), "norm", log=True,
              note="Healthy: a narrow band within a stage. Bad sign: spikes that come more and more often; it is "
              "clipped at optimizer.clip_norm."),
        Chart("Pairs per step", ("udasa/pairs",), "pairs, all ranks", from_zero=True, is_noisy=False,
              note="Healthy: udasa.curriculum.pairs_per_step, or little less. Bad sign: a handful: so small a stage "
              "teaches noise."),
        Chart("Skipped steps", ("train/skipped_steps",), "steps since the start", from_zero=True, is_noisy=False,
              note="Healthy: 0. Bad sign: each step up is a loss or gradient that was not finite."),
    )),
    Chapter("Is it fast?", (
        Chart("Throughput", ("perf/tokens_per_second",), "response tokens per second, all ranks", from_zero=True,
              note="Healthy: flat. Bad sign: a lasting fall."),
        Chart("Time", ("time/step_seconds", "time/reference_seconds", "time/checkpoint_seconds"), "seconds", log=True,
              note="Healthy: a reference costs about as much as one pass over the stage. Bad sign: checkpoints take "
              "longer than what lies between two of them."),
        Chart("Memory of the largest rank", ("memory/peak_bytes",), "bytes", from_zero=True, is_noisy=False,
              note="Healthy: flat after the first steps. Bad sign: it grows for as long as the run lasts."),
        Chart("Tokens trained on", ("tokens/rollout",), "response tokens since the start", is_noisy=False,
              note="Healthy: bends only where a stage begins. Bad sign: flat: steps are skipped."),
    )),
)  # fmt: skip
NOT_CHARTED = {"udasa/stage"}  # the bands
HISTOGRAMS = {  # title, note
    "total": (
        "Δu", "Healthy: spread wide, with pairs on both sides of every threshold τ (dashed). Bad sign: a heap at 0: "
        "pairs that hardly differ; or thresholds that leave a stage empty."),
    "semantic": (
        "Semantic", "Healthy: mostly above 0: the rejected response is the odd one out. Bad sign: as much below 0 as "
        "above: this part has no say in who is chosen."),
    "factual": ("Factual", "Healthy: mostly above 0. Bad sign: mostly below: the doubted response was preferred."),
    "value": ("Value", "Healthy: mostly above 0. Bad sign: mostly below: the less harmless response was preferred."),
}  # fmt: skip


def udasa_chapters(run: RunFiles, bands: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The charts with values; held-out lines break where a stage begins: it holds out other pairs.

    Args:
        bands: of the stages.
    """
    chapters = filled(CHAPTERS, NOT_CHARTED, run)
    for series in (one for chapter in chapters for chart in chapter["charts"] for one in chart["series"]):
        if series["name"].startswith("eval/") and "low" not in series:
            _break(series, [band["from"] for band in bands[1:]])
    return chapters


def _break(series: dict[str, Any], steps: list[int]) -> None:
    """A gap after each of the steps."""
    points = [*zip(series["x"], series["y"], strict=True), *((step, None) for step in steps)]
    points.sort(key=lambda point: (point[0], point[1] is None))
    series["x"], series["y"] = [x for x, _ in points], [y for _, y in points]


def histograms(files: RoundFiles) -> list[dict[str, Any]]:
    """Of Δu and of each uncertainty's difference within a pair, for page.js; none before there are pairs."""
    if files.summary is None or files.summary.summary.num_pairs == 0:
        return []
    summary = files.summary.summary
    return [
        {
            "title": HISTOGRAMS[name][0],
            "unit": "rejected minus chosen",
            "note": HISTOGRAMS[name][1],
            "edges": rounded(found.edges),
            "counts": list(found.counts),
            "thresholds": list(summary.thresholds) if name == "total" else [],
        }
        for name, found in summary.histograms.items()
    ]
