"""The page: self-contained, safe whatever the run wrote, there for every state of a run."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from asa_dist.config import ConfigError
from asa_dist.report import asa_charts, udasa_charts, write_report
from asa_dist.report.curves import MAX_POINTS
from asa_dist.report.step_time import KEYS as STEP_TIME_KEYS
from asa_dist.runtime.run_lock import hold_run_folder
from tests.report.report_runs import EVIL, STARTED, end, metrics, sample, write_report_run
from tests.run_folders import write_rows, write_run

ROOT = Path(__file__).parent.parent.parent
LOADING = {"src", "href", "srcset", "action", "data", "poster", "background", "formaction", "ping", "xlink:href"}


class Page(HTMLParser):
    """What a browser would find."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.path = path
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.scripts: list[str] = []
        self.styles: list[str] = []
        self.text = ""
        self._open = ""
        self.feed(path.read_text(encoding="utf-8"))
        self.close()

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attributes)))
        self._open = tag
        if tag in ("script", "style"):
            (self.scripts if tag == "script" else self.styles).append("")

    def handle_endtag(self, tag: str) -> None:
        self._open = ""

    def handle_data(self, data: str) -> None:
        if self._open in ("script", "style"):
            (self.scripts if self._open == "script" else self.styles)[-1] += data
        else:
            self.text += data

    @property
    def data(self) -> dict[str, Any]:
        return json.loads(self.scripts[0])


METHODS = (asa_charts, udasa_charts)


def charted_keys(charts: ModuleType) -> list[str]:
    return [key for chapter in charts.CHAPTERS for chart in chapter.charts for key in chart.keys]


def report(run_dir: Path) -> Page:
    path = write_report(run_dir)
    assert path == run_dir / "report.html"
    return Page(path)


def test_nothing_leaves_the_page(tmp_path: Path) -> None:
    page = report(write_report_run(tmp_path / "run"))
    links = [value for _, attributes in page.tags for name, value in attributes.items() if name in LOADING]
    assert links == ["data:,"], "the empty icon"
    assert len(page.styles) == 1 and "url(" not in page.styles[0] and "@import" not in page.styles[0]
    assert not any(name.startswith("on") for _, attributes in page.tags for name in attributes)
    policy = next(attributes["content"] for tag, attributes in page.tags if "http-equiv" in attributes)
    assert policy is not None and "default-src 'none'" in policy and "http" not in policy
    own_script = page.scripts[2]
    assert "http" not in own_script and "innerHTML" not in own_script and "Plotly.react" in own_script


def test_strings_of_a_run_are_never_html(tmp_path: Path) -> None:
    evil_event = {"event": EVIL, "time": EVIL, EVIL: EVIL}
    run = write_report_run(tmp_path / "run", 100, STARTED, evil_event, end("finished", 100))
    harmless = [tag for tag, _ in report(run).tags]
    write_rows(run, "samples", sample(1, EVIL, EVIL, "\ud800", **{EVIL: 0.5}))
    write_rows(run, "metrics", *metrics(100), {"step": 100, EVIL: 1.0})
    text = (run / "config.yaml").read_text()
    (run / "config.yaml").write_text(text.replace("prompt_file: null", f"prompt_file: {json.dumps(EVIL)}"))
    page = report(run)
    assert [tag for tag in [tag for tag, _ in page.tags] if tag in ("img", "script")] == ["script"] * 3
    assert set(harmless) == {tag for tag, _ in page.tags}, "no element that was not there before"
    group = page.data["samples"]["groups"][0]
    assert group["prompt"] == EVIL and group["responses"][0]["text"] == EVIL and EVIL in page.data["samples"]["terms"]
    assert page.text.count(EVIL) >= 3 + 2, "time, event, details; the setting, among the changed ones and among all"


def test_what_the_page_says(tmp_path: Path) -> None:
    run = write_report_run(tmp_path / "run")
    write_rows(run, "evals", {"step": 100, "truth/greedy": 0.75, "note": "first", "nothing": None})
    page = report(run)
    for text in ("run", "finished", "step 100 of 100", "29.00", "bigram model of the same tokens: 40.00", "step 21",
                 "nothing lost", "truth/greedy", "0.75", "objective.beta", "2,000"):
        assert text in page.text, text
    assert "Look at this first" not in page.text
    data = page.data
    assert data["last_step"] == 100 and data["warmup"] == {"from": 1, "to": 21, "last": 100}
    series = {s["name"]: s for chapter in data["chapters"] for chart in chapter["charts"] for s in chart["series"]}
    assert series["trust/tau"]["x"] == list(range(1, 101)) and series["eval/perplexity"]["y"] == [600.0, 29.5, 29.0]
    assert len(data["samples"]["groups"]) == 10


def test_keys_it_does_not_know_are_shown_too(tmp_path: Path) -> None:
    run = write_report_run(tmp_path / "run")
    write_rows(run, "metrics", *metrics(10), {"step": 10, "future/key": 1.0})
    last = report(run).data["chapters"][-1]
    assert last["title"] == "Further metrics" and [chart["title"] for chart in last["charts"]] == ["future/key"]


@pytest.mark.parametrize("missing", ["metrics", "samples", "events", "trained", "checkpoints", "all"])
def test_missing_files(tmp_path: Path, missing: str) -> None:
    run = write_report_run(tmp_path / "run")
    for name in ("metrics", "samples", "events", "trained") if missing == "all" else (missing,):
        (run / f"{name}.jsonl").unlink(missing_ok=True)
    if missing in ("checkpoints", "all"):
        (run / "checkpoints").rename(tmp_path / "checkpoints")
    page = report(run)
    assert ("No step has been logged yet." in page.text) == (missing in ("metrics", "all"))
    assert ("No responses have been sampled yet." in page.text) == (missing in ("samples", "all"))
    assert ("Nothing has been recorded." in page.text) == (missing in ("events", "all"))


def test_a_run_before_its_first_step(tmp_path: Path) -> None:
    write_run(tmp_path / "run")
    page = report(tmp_path / "run")
    assert "not started" in page.text and "step 0 of 10" in page.text and page.data["chapters"] == []


def test_a_run_under_way_with_torn_lines(tmp_path: Path) -> None:
    run = write_report_run(tmp_path / "run", 60, STARTED)
    for name in ("metrics", "samples", "trained", "events"):
        with (run / f"{name}.jsonl").open("a") as file:
            file.write('{"step": 61, "loss/to')
    with hold_run_folder(run):
        page = report(run)
    assert "running" in page.text and "step 60 of 100" in page.text and "Look at this first" not in page.text


def test_nan_and_null(tmp_path: Path) -> None:
    run = write_report_run(tmp_path / "run")
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"step": 101, "loss/total": NaN, "trust/tau": null, "loss/mle": Infinity}\n')
    series = {s["name"]: s for c in report(run).data["chapters"] for chart in c["charts"] for s in chart["series"]}
    assert [series[key]["y"][-1] for key in ("loss/total", "trust/tau", "loss/mle")] == [None] * 3


def test_the_config_beside_the_defaults(tmp_path: Path) -> None:
    page = report(write_report_run(tmp_path / "run"))
    changed, _, everything = page.text.partition("settings")
    assert "train.steps" in changed and "rollout.top_p" not in changed and "rollout.top_p" in everything


def test_a_run_from_elsewhere(tmp_path: Path) -> None:
    """Its data files and a key of its config are not there any more, or not yet."""
    run = write_report_run(tmp_path / "run")
    text = (run / "config.yaml").read_text()
    (run / "config.yaml").write_text(
        text.replace("prompt_file: null", "prompt_file: /nowhere/prompts.jsonl").replace("seed:", "new_key: 3\nseed:"))
    assert "/nowhere/prompts.jsonl" in report(run).text


@pytest.mark.parametrize(("text", "said"), [
    ("train: {steps: abc}", "train.steps = 'abc': Input should be a valid integer"),
    ("objective: {beta: y}", "objective.beta = 'y': Input should be a valid number"),
    ("objective: {beta: .nan}", "objective.beta = nan: Input should be a finite number"),
    ("train: 5", "train = 5: Input should be"),
    ("{3: 4, seed: 2000-01-01}", "seed = datetime.date(2000, 1, 1): Input should be a valid integer"),
    ("rollout: {responses_per_prompt: [8]}", "rollout.responses_per_prompt = [8]: "),
])  # fmt: skip
def test_a_config_with_wrong_values(tmp_path: Path, text: str, said: str) -> None:
    """What can be shown is shown, the default instead of them, and they are named."""
    run = write_report_run(tmp_path / "run")
    (run / "config.yaml").write_text(text)
    page = report(run)
    assert f"config.yaml: {said}" in page.text and "Look at this first" in page.text
    assert "step 100 of 400,000" in page.text and "β = 0.4" in page.text


def test_values_beyond_every_float(tmp_path: Path) -> None:
    run = write_report_run(tmp_path / "run")
    with (run / "metrics.jsonl").open("a") as file:
        file.write(f'{{"step": 101, "loss/total": {10**400}}}\n{{"step": 1e300, "loss/total": 1.0}}\n'
                   f'{{"step": {2**63}, "loss/total": 1.0}}\n')
    with (run / "samples.jsonl").open("a") as file:
        file.write(json.dumps(sample(101) | {"tau": float("nan")}) + "\n")
    write_rows(run, "evals", {"step": 10**400, "eval/perplexity": 10**400, "trust/tau": float("inf")})
    data = report(run).data
    assert data["last_step"] == 101 and data["samples"]["groups"][-1]["tau"] is None


def test_without_plotly(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "plotly.offline", None)
    with pytest.raises(ConfigError, match=r"plotly is not installed: .*: pip install plotly"):
        write_report(write_report_run(tmp_path / "run"))


def test_where_it_is_written(tmp_path: Path) -> None:
    run = write_report_run(tmp_path / "run")
    out = tmp_path / "elsewhere.html"
    assert write_report(run, out) == out and out.stat().st_size > 1_000_000 and not (run / "report.html").exists()
    with pytest.raises(ConfigError, match=r"the report .*/nowhere/a\.html cannot be written: No such file"):
        write_report(run, tmp_path / "nowhere/a.html")
    with pytest.raises(ConfigError, match="is no run folder"):
        write_report(tmp_path)


def test_no_torch() -> None:
    program = "import asa_dist.report, sys; print(*({'torch', 'ray', 'deepspeed', 'transformers'} & set(sys.modules)))"
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, cwd=ROOT, text=True, capture_output=True, check=True, timeout=60)
    assert done.stdout.strip() == ""


def test_every_metric_of_the_readme_has_its_chart() -> None:
    charted = {key for charts in METHODS for key in charted_keys(charts)}
    not_charted = {key for charts in METHODS for key in charts.NOT_CHARTED} | STEP_TIME_KEYS
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    section = readme.partition("## Metric keys\n")[2].partition("\n## ")[0]
    cells = [line.split("|")[1] for line in section.splitlines() if line.startswith("| `")]
    explained = {key for cell in cells for key in re.findall("`([^`]+)`", cell)} - {"step"}
    assert len(explained) > 30 and explained <= charted | not_charted


def test_a_long_run_is_a_page_of_bounded_size(tmp_path: Path) -> None:
    run = write_report_run(tmp_path / "run", 5_000, num_steps=5_000)
    assert write_report(run).stat().st_size < 7_000_000
    page = Page(run / "report.html")
    assert "a point is the mean of up to 5 neighbouring values" in page.text
    series = [s for chapter in page.data["chapters"] for chart in chapter["charts"] for s in chart["series"]]
    assert max(len(s["x"]) for s in series) <= MAX_POINTS and any("low" in s for s in series)


@pytest.mark.parametrize("charts", METHODS)
def test_charts_name_each_key_once_and_say_what_is_healthy(charts: ModuleType) -> None:
    keys = charted_keys(charts)
    assert len(keys) == len(set(keys)) and not charts.NOT_CHARTED & set(keys)
    notes = [chart.note for chapter in charts.CHAPTERS for chart in chapter.charts]
    assert all(note.startswith("Healthy: ") and "Bad sign: " in note for note in notes)
