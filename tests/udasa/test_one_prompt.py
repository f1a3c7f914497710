"""N responses asked for at once: the paper's words, and an answer's parts, however the model numbers them."""

from __future__ import annotations

import pytest

from asa_dist.udasa.one_prompt import instruction, split_responses


@pytest.mark.parametrize(("text", "expected"), [
    ("1. Iron.\n2. Gold,\nI think.\n3. Zinc.", ["Iron.", "Gold,\nI think.", "Zinc."]),
    ("Sure! Here they are:\n\n**Response 1:** Iron.\n\n**Response 2:**\nGold:\n1. heavy\n2. soft\n",
     ["Iron.", "Gold:\n1. heavy\n2. soft"]),
    ("### Answer 1\nIron\n### Answer 2\n\n### ANSWER 3 - Zinc", ["Iron", "Zinc"]),
    ("(1) Iron\n(2) Gold\n7) of seven", ["Iron", "Gold\n7) of seven"]),
    ("Iron.\n\nGold: 2. of all\n \n\nZinc.\n", ["Iron.", "Gold: 2. of all", "Zinc."]),
    ("1. Only one", ["1. Only one"]),
    (" \n\n ", []),
])
def test_an_answer_is_split_into_responses(text: str, expected: list[str]) -> None:
    assert split_responses(text) == expected


def test_the_instruction_is_the_papers() -> None:
    assert instruction("Why {so}?", 5) == (
        "You are a professional AI assistant. Please provide 5 distinct responses to the following question. Ensure "
        "each response is independent. Question: Why {so}?")
