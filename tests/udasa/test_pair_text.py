"""Pairs for people: the right ones, none twice, numbers under their names, whatever the texts contain on one line."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest

from asa_dist.records import PreferencePair
from asa_dist.udasa.pair_text import LINE_CHARACTERS, show_pairs
from asa_dist.udasa.pairs import make_pairs
from tests.udasa.measured import random_prompts

PAIRS = make_pairs(random_prompts(20)).pairs  # 16
STAGE_BY_ID = {pair.prompt_id: int(pair.delta_u < 0.5) for pair in PAIRS}


def shown(pairs: list[PreferencePair], count: int) -> dict[str, list[int]]:
    """Prompt ids under each title."""
    found: dict[str, list[int]] = {}
    for line in show_pairs(pairs, STAGE_BY_ID, count).splitlines():
        if line.startswith(("clearest", "most")):
            ids = found.setdefault(line, [])
        elif line.startswith("Δu"):
            ids.append(int(line.partition("prompt ")[2].partition(":")[0]))
    return found


@pytest.mark.parametrize("count", [1, 3, 8])
def test_the_extremes_are_shown_the_most_extreme_first(count: int) -> None:
    by_delta = [pair.prompt_id for pair in sorted(PAIRS, key=lambda pair: pair.delta_u)]
    assert shown(random.Random(2).sample(PAIRS, 16), count) == {
        f"clearest: {count} of 16 pairs": by_delta[::-1][:count],
        f"most doubtful: {count} of 16 pairs": by_delta[:count],
    }


@pytest.mark.parametrize(("num_pairs", "count", "num_clearest", "num_doubtful"), [
    (5, 3, 3, 2), (4, 3, 3, 1), (3, 3, 3, 0), (2, 3, 2, 0), (1, 1, 1, 0), (16, 9, 9, 7),
])  # fmt: skip
def test_of_few_pairs_none_is_shown_twice(num_pairs: int, count: int, num_clearest: int, num_doubtful: int) -> None:
    found = shown(list(PAIRS[:num_pairs]), count)
    assert list(map(len, found.values())) == [num for num in (num_clearest, num_doubtful) if num]
    ids = [prompt_id for own in found.values() for prompt_id in own]
    assert len(set(ids)) == len(ids) == min(num_pairs, 2 * count)


def test_equal_pairs_are_shown_by_prompt_id() -> None:
    equal = [replace(pair, delta_u=0.5) for pair in PAIRS]
    first, *_, last = sorted(pair.prompt_id for pair in PAIRS)
    assert list(shown(equal[::-1], 1).values()) == [[first], [last]]


def test_a_pair_says_all_that_was_measured() -> None:
    pair = PAIRS[0]
    chosen = replace(pair.chosen, text="Iron.", u_semantic=-0.25, u_factual=0.5, u_value=None, u_total=0.125)
    rejected = replace(pair.rejected, text="Tin", u_semantic=1.25, u_factual=1.0, u_value=0.0, u_total=0.75)
    pair = replace(pair, prompt_id=12, prompt="Which metal?", chosen=chosen, rejected=rejected, delta_u=0.625)
    assert show_pairs([pair], {12: 2}, 4).splitlines() == [
        "clearest: 1 of 1 pairs",
        "            semantic   factual     value     total",
        "Δu 0.6250, stage 3, prompt 12: 'Which metal?'",
        "  chosen     -0.2500    0.5000         –    0.1250  'Iron.'",
        "  rejected    1.2500    1.0000    0.0000    0.7500  'Tin'",
    ]
    assert show_pairs([], {}, 4) == "there are no pairs to show"


def test_texts_stay_on_their_line() -> None:
    """Nor do they move the cursor of a terminal, or hide that they begin with a space."""
    text = " Größe\n\n\t\x1b[2J\u2028end\r"
    pair = replace(PAIRS[0], prompt=text * 9, chosen=replace(PAIRS[0].chosen, text=text),
                   rejected=replace(PAIRS[0].rejected, text="a" * 1000))
    prompt, chosen, rejected = show_pairs([pair], STAGE_BY_ID, 1).splitlines()[2:]
    assert prompt.endswith("…") and r": ' Größe\n\n\t\x1b[2J\u2028end\r Größe" in prompt
    assert chosen.endswith(r"  ' Größe\n\n\t\x1b[2J\u2028end\r'")
    assert rejected.endswith("aaa…") and len(rejected) == len(prompt) == LINE_CHARACTERS
