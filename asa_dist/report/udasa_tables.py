"""Tables of a round of UDASA: its curriculum, what was measured, what was skipped and why; and what the KL is of."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from html import escape

from asa_dist.report.curves import is_number, rounded
from asa_dist.report.markup import number, table
from asa_dist.report.run_files import RunFiles
from asa_dist.report.udasa_round import RoundFiles
from asa_dist.report.udasa_stages import Stage, Training, in_turn
from asa_dist.udasa.pairs import NO_PAIR_REASONS

SHOWN_IDS = 8
SHOWN_NOTICES = 20


# --- curriculum -------------------------------------------------------------------------------------------------
def curriculum_section(run: RunFiles, stages: list[Stage]) -> str:
    """Empty before there are pairs."""
    if not stages:
        return ""
    heads = ("stage", "Δu", "turn", "pairs", "trained on", "held out", "steps", "held-out loss", "margin", "accuracy",
             "how it ended")  # fmt: skip
    lines = (_stage_line(stage, is_running=run.state == "running") for stage in stages)
    return (
        f"<section id=curriculum><h2>Curriculum</h2>{table(heads, lines)}"
        f'<p class="note">{escape(_note_on_kl(run, stages))}</p></section>'
    )


def _stage_line(stage: Stage, is_running: bool) -> str:
    training = stage.training
    shown = [str(stage.number), stage.span, "–", f"{stage.num_pairs:,}", *["–"] * 6]
    if training is not None:
        report = training.report
        shown[2] = str(training.turn)
        shown[4:7] = f"{report.pairs:,}", f"{report.heldout_pairs:,}", f"{report.steps:,} of {report.planned_steps:,}"
        shown[7:10] = (_first_and_last(training.heldout.get(name, [])) for name in ("loss", "margin", "accuracy"))
    cells = "".join(f"<td class=number>{escape(text)}</td>" for text in shown)
    return f"<tr>{cells}<td>{escape(_end_of(stage, is_running))}</td></tr>"


def _first_and_last(values: Sequence[float]) -> str:
    if len(values) < 2:
        return number(values[0], 3) if values else "–"
    return f"{number(values[0], 3)} → {number(values[-1], 3)}"


def _end_of(stage: Stage, is_running: bool) -> str:
    training = stage.training
    if training is None:
        return "unknown" if stage.num_pairs else "skipped: no pairs"
    if training.has_ended:
        said = str(training.report.ended)
    elif training.is_under_way:
        said = "under way" if is_running else "not ended yet"
    else:
        said = "not begun"
    return said if training.report.heldout_pairs else f"{said}; without held-out pairs nothing can end it early"


def _note_on_kl(run: RunFiles, stages: list[Stage]) -> str:
    text = (
        "KL is the mean of log p(reference) − log p(model) over the tokens of the stored pairs. It would estimate "
        "KL(reference‖model) without bias if these were fresh samples of the reference; they are responses from before "
        "training, two of each prompt's, selected by their uncertainty. "
    )
    if ways := _other_sampling(run):
        text += f"They were {' and '.join(ways)}, which biases it, too. "
    trained = in_turn(stages)
    if run.setting("udasa.dpo.reference") == "base":
        text += "The reference (base) is the model that wrote them, so only that selection biases it. "
    elif len(trained) > 1:
        text += (
            f"The reference is the model at the start of each stage: in {_names(trained[:1])}, trained first, the one "
            f"that wrote them, so only that selection biases it; in {_names(trained[1:])} one that did not write them, "
            "so there it is biased and can be below 0: take it as drift on these texts, no more. "
        )
    else:
        text += "The reference is the model that wrote them, as there is one stage, so only that selection biases it. "
    weight = run.setting("udasa.dpo.kl_weight")
    if trained and is_number(weight) and weight > 0:
        text += f"As a penalty, {weight:g} times this, it is part of the loss of {_names(trained[-1:])}, the last one."
    return text


def _other_sampling(run: RunFiles) -> list[str]:
    """In which ways responses are no samples of the model's distribution at temperature 1 behind the prompt."""
    ways = []
    if run.setting("udasa.sampling") == "one_prompt":
        ways.append("asked for all at once, behind another prompt")
    if (temperature := run.setting("rollout.temperature")) != 1:
        ways.append(f"sampled at temperature {temperature}")
    usual = {"top_p": 1, "top_k": 0, "min_p": 0}
    ways += [f"cut by {name} = {value}" for name, off in usual.items()
             if (value := run.setting(f"rollout.{name}")) != off]  # fmt: skip
    return ways


def _names(trained: Sequence[Training]) -> str:
    numbers = [str(training.report.stage) for training in trained]
    return f"stage{'s' if len(numbers) > 1 else ''} {' and '.join(numbers)}"


# --- what was measured ------------------------------------------------------------------------------------------
def measured_section(files: RoundFiles) -> str:
    if not files.measured.values:
        return '<section id="measured"><h2>What was measured</h2><p>Nothing yet.</p></section>'
    heads = ("uncertainty", "responses", "unmeasured", "smallest", "mean", "largest")
    lines = (
        f"<tr><td>{escape(name)}</td>"
        + "".join(f"<td class=number>{text}</td>" for text in (
            f"{values.num_known:,}", f"{values.num_unknown:,}",
            *("–" if value is None else f"{value:.3f}" for value in rounded((values.low, values.mean, values.high)))))
        + "</tr>"
        for name, values in files.measured.values.items()
    )  # fmt: skip
    return f'<section id="measured"><h2>What was measured</h2>{table(heads, lines)}</section>'


# --- what was skipped -------------------------------------------------------------------------------------------
def skipped_section(run: RunFiles, files: RoundFiles) -> str:
    lines = [
        f"<tr><td>{escape(what)}</td><td class=number>{count:,}</td><td class=details>{escape(details)}</td></tr>"
        for what, count, details in _skipped(run, files)
    ]
    content = table(("what, and why", "how many", "prompts, the first ones"), lines) if lines else "<p>Nothing.</p>"
    return f'<section id="skipped"><h2>What was skipped</h2>{content}{_notices(run)}</section>'


def _skipped(run: RunFiles, files: RoundFiles) -> Iterator[tuple[str, int, str]]:
    """(what and why, how many, which)."""
    yield from _left_out(run, files)
    measured = files.measured
    if measured.num_empty:
        yield "responses that say nothing", measured.num_empty, _ids(measured.first_empty)
    for name, values in measured.values.items():
        if values.num_unknown:
            what = "no total, as a part is missing" if name == "total" else f"{name} uncertainty could not be measured"
            yield f"responses: {what}", values.num_unknown, ""
    if files.summary is not None:
        for reason, count in files.summary.summary.num_unpaired.items():
            if count:
                ids = [prompt_id for prompt_id, why in files.summary.unpaired.items() if why == reason]
                yield f"prompts without a pair: {NO_PAIR_REASONS.get(reason, reason)}", count, _ids(ids)


def _left_out(run: RunFiles, files: RoundFiles) -> Iterator[tuple[str, int, str]]:
    """Prompts that were never asked: as written down at the end of measuring, before that as announced."""
    if files.measured.left_out:
        for reason, ids in files.measured.left_out.items():
            yield f"prompts left out: {reason}", len(ids), _ids(ids)
        return
    announced = [event for event in run.events if event["event"] == "prompts_left_out"]
    for event in announced[-1:]:  # whoever goes on with measuring announces them again
        count = event.get("count")
        yield f"prompts left out; the first: {event.get('reason')}", count if isinstance(count, int) else 0, ""


def _notices(run: RunFiles) -> str:
    """What the estimators had to say, each notice once."""
    counts = Counter(str(event.get("notice")) for event in run.events if event["event"] == "estimator_notice")
    if not counts:
        return ""
    items = [
        f"<li>{escape(notice)}{f' (× {count:,})' if count > 1 else ''}</li>"
        for notice, count in counts.most_common(SHOWN_NOTICES)
    ]
    if len(counts) > len(items):
        items.append(f"<li>and {len(counts) - len(items):,} more: see events.jsonl</li>")
    return f"<h3>What the estimators say</h3><ul class=notices>{''.join(items)}</ul>"


def _ids(ids: Iterable[int]) -> str:
    found = list(ids)
    return ", ".join(map(str, found[:SHOWN_IDS])) + (", …" if len(found) > SHOWN_IDS else "")
