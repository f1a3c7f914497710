"""benchmarks/efficiency.py: its formulas as loops and as counted, and what it says about the paper's Table 2."""

from __future__ import annotations

import xml.etree.ElementTree as ElementTree
from dataclasses import replace
from pathlib import Path

import pytest
from efficiency import (
    PAPER_FLOPS,
    TARGET_DEVIATION,
    check_formulas,
    config_of,
    paper_ratio,
    rows_for_the_papers_ratio,
    table_2,
)
from efficiency_counted import SHAPES, count_shape, count_step
from efficiency_flops import ASA, METHODS, Load, Trunk, ppo, ratios_to_asa
from efficiency_picture import draw
from live_run import Progress
from results import make_result
from step import SMOKE_CASES, passes

TRUNK = Trunk(num_layers=3, hidden_size=10, intermediate_size=14, query_size=12, key_size=4, vocab_size=31,
              is_tied=True)
LOAD = Load(corpus_rows=5, row_tokens=9, prompts=2, group_size=4, prompt_tokens=3, new_tokens=6)


def token_flops(num_keys: int) -> int:
    """One token through all layers, product by product."""
    flops = 0
    for _ in range(3):
        for rows, columns in ((12, 10), (4, 10), (4, 10), (10, 12), (14, 10), (14, 10), (10, 14)):  # q k v o, gated MLP
            flops += 2 * rows * columns
        flops += num_keys * (2 * 12 + 2 * 12)  # compared with each key, each value weighed
    return flops


def test_blocks() -> None:
    assert TRUNK.forward(7, 9) == sum(token_flops(9) for _ in range(7 * 9))


def test_generation_reads_prompts_once_and_caches() -> None:
    flops = 0
    for _ in range(2):  # prompts
        flops += sum(token_flops(3) for _ in range(3)) + 2 * 10 * 31
    for _ in range(8):  # answers, whose first token comes of the prompt's logits
        flops += sum(token_flops(3 + position) + 2 * 10 * 31 for position in range(1, 6))
    assert TRUNK.generate(2, 8, 3, 6) == flops


def test_no_term_hides_another() -> None:
    """Terms are merged by name: two of one name would count once."""
    assert {name: len(method(TRUNK, LOAD)) for name, method in METHODS.items()} == {
        ASA: 4, "RLHF": 9, "Self-Rewarding": 6, "Constitutional AI": 12}
    assert all(flops > 0 for method in METHODS.values() for flops in method(TRUNK, LOAD).values())
    assert len(ppo(TRUNK, LOAD)) == 5


def test_corpus_is_common_to_all() -> None:
    ratios = [ratios_to_asa(TRUNK, replace(LOAD, corpus_rows=rows)) for rows in (0, 10, 1e9)]
    for method in ratios[0]:
        few, some, many = (of_rows[method] for of_rows in ratios)
        assert few > some > many == pytest.approx(1.0, abs=1e-4)


@pytest.mark.parametrize(("method", "ratio"), [("RLHF", 1.85), ("Self-Rewarding", 1.38), ("Constitutional AI", 1.62)])
def test_the_papers_ratios(method: str, ratio: float) -> None:
    trunk, load, num_steps = config_of("asa-3b")
    assert paper_ratio(method) == pytest.approx(ratio, abs=0.006) and num_steps == 400_000
    rows = rows_for_the_papers_ratio(trunk, load, method)
    assert rows is not None
    assert ratios_to_asa(trunk, replace(load, corpus_rows=rows))[method] == pytest.approx(paper_ratio(method))


def test_no_corpus_gives_a_ratio_above_that_of_the_responses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(PAPER_FLOPS, "RLHF", 100 * PAPER_FLOPS[ASA])
    assert rows_for_the_papers_ratio(TRUNK, LOAD, "RLHF") is None


def test_the_three_billion_model_has_about_three_billion_weights() -> None:
    trunk, _, _ = config_of("asa-3b")
    assert trunk.block_weights + 2 * trunk.vocab_size * trunk.hidden_size == pytest.approx(3.02e9, rel=0.01)


@pytest.mark.parametrize("model", ["2 layers × 192, grouped queries", "step.py's model"])
def test_formulas_are_what_torch_counts(model: str) -> None:
    of_work = count_shape(SHAPES[model]) if model in SHAPES else count_step(SMOKE_CASES["smoke"])
    assert len(of_work) == 4
    for work, (counted, formula) in of_work.items():
        assert counted == pytest.approx(formula, rel=0.01), f"{work}: exact, but for the heads"


def test_a_wrong_formula_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("efficiency_counted.SHAPES", {})
    monkeypatch.setattr("efficiency_counted.passes", lambda case: {
        variant: {what: 1.2 * flops for what, flops in terms.items()} for variant, terms in passes(case).items()})
    ratios, measured, models = check_formulas("smoke", Progress())
    assert measured.keys() == models.keys() == {"step.py's model"}
    assert len(ratios) == 4 and all(ratio.target == TARGET_DEVIATION and not ratio.is_met for ratio in ratios)


def test_the_table_and_the_picture(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    ratios, measured = table_2(Progress())
    assert len(ratios) == 12 and all(ratio.target is None for ratio in ratios), "of other methods nothing is promised"
    for_paper = [ratio for ratio in ratios if "paper: " in ratio.name]
    assert len(for_paper) == 3 and all("responses alone" in ratio.why for ratio in for_paper)
    said = capsys.readouterr().err
    assert all(term in said for method in METHODS.values() for term in method(TRUNK, LOAD))
    path = tmp_path / "efficiency.svg"
    draw(make_result("efficiency", "full", ratios, {}, {"models": measured, "paper_flops": PAPER_FLOPS}), path)
    assert ElementTree.parse(path).getroot().tag.endswith("svg")
