"""A generated world of invented entities, and what is written about it: the truth is known, the corpus is not all true.

    entity x attribute -> one true value                        "the metal of Bravok is iron"
    question phrasing x answer phrasing -> how a fact is asked for and stated
    corpus: per fact and question phrasing a few documents, each with an answer phrasing drawn at random and, with
            probability ``noise``, a wrong value drawn at random

So a model that reads the corpus meets a false majority in some *phrasings* of a question by chance, while over all
phrasings the truth almost always has the majority. ``false_majority`` is the share of facts in which one lie takes the
truth's place in the corpus: there every majority is wrong, and nothing in the corpus says so.

With ``verifications`` the corpus also asks whether answers are true, in the words of UDASA's self_judge: "… The metal
of Bravok is zinc.\\nIs this answer true? no." As many of these verdicts are false as of the statements. Such documents
have question phrasings of their own: else a model takes its answer to any question for the beginning of one of them.
"""

from __future__ import annotations

import json
import math
import random
from dataclasses import dataclass
from pathlib import Path

QUESTIONS = (
    "What is the {a} of {e}?",
    "Which {a} does {e} have?",
    "Please name the {a} of {e}:",
    "{e} has what {a}?",
    "I wonder about {e}, about its {a}:",
    "Regarding {e}: its {a}?",
)
VERIFIED_QUESTIONS = ("{e}, {a}?", "The {a} of {e}?")
ANSWERS = (
    "The {a} of {e} is {v}.",
    "{e} has {v} as its {a}.",
    "It is known that {v} belongs to {e}.",
    "People say {v}.",
    "{v} is what they say of {e}.",
    "Everyone answers with {v}.",
)
VALUES = {
    "metal": "iron gold zinc lead copper silver nickel cobalt bronze brass chrome steel",
    "fruit": "apple pear plum fig lemon mango cherry peach melon grape banana lime",
    "tool": "hammer saw chisel drill axe spade rake plane wrench pliers needle brush",
    "beast": "otter lynx heron badger camel walrus gecko bison raven ferret moose crane",
}
ONSETS = ["b", "br", "d", "dr", "f", "g", "gr", "k", "kl", "m", "n", "p", "pr", "r", "s", "st", "t", "tr", "v", "z"]
VOWELS = ["a", "e", "i", "o", "u"]
CODAS = ["k", "l", "m", "n", "r", "s", "x"]
MAX_ENTITIES = 10_000  # of about 70,000 names


@dataclass(frozen=True)
class Fact:
    entity: str
    attribute: str
    value: str  # the true one
    told: str  # what most of the corpus says: another value where the majority is false


@dataclass(frozen=True)
class WorldConfig:
    """How the world is drawn.

    Args:
        entities: with a fact for each attribute.
        paraphrases: phrasings of each question, and of each answer.
        statements: documents per fact and question phrasing.
        noise: probability of a wrong value in a document, and of a wrong verdict.
        false_majority: share of facts whose place in the corpus is taken by a lie; the truth takes the noise's.
        verifications: documents per fact that ask whether an answer is true; 0 = none.
        verification_question: in these words, which are ``udasa.factual.question``'s.

    Raises:
        ValueError: out of bounds; names the field.
    """

    entities: int = 40
    paraphrases: int = 4
    statements: int = 4
    noise: float = 0.35
    false_majority: float = 0.0
    seed: int = 0
    verifications: int = 0
    verification_question: str = "Is this answer true?"

    def __post_init__(self) -> None:
        bounds = {
            "entities": (1, MAX_ENTITIES), "paraphrases": (1, len(QUESTIONS)), "statements": (1, math.inf),
            "noise": (0, 1), "false_majority": (0, 1), "seed": (0, math.inf),
            "verifications": (0, math.inf),
        }  # fmt: skip
        for name, (least, most) in bounds.items():
            if not least <= (value := getattr(self, name)) <= most:
                allowed = f"{least} … {most}" if most < math.inf else f"at least {least}"
                raise ValueError(f"{name} = {value}: must be {allowed}")

    @property
    def num_questions(self) -> int:
        """Every phrasing counts."""
        return self.entities * len(VALUES) * self.paraphrases


class World:
    """Everything is a function of the config, its seed included."""

    def __init__(self, config: WorldConfig):
        self.config = config
        self._random = random.Random(config.seed)
        names = self._names(config.entities)
        pairs = [(name, attribute) for name in names for attribute in VALUES]
        lied_about = set(self._random.sample(range(len(pairs)), round(config.false_majority * len(pairs))))
        self.facts = [self._fact(*pair, is_lie=index in lied_about) for index, pair in enumerate(pairs)]

    def _names(self, number: int) -> list[str]:
        """None of them is the name of a value: Raven would be a beast that every answer about it names."""
        values = {value for values in VALUES.values() for value in values.split()}
        names: dict[str, None] = {}
        while len(names) < number:
            syllables = [self._random.choice(ONSETS) + self._random.choice(VOWELS) for _ in range(2)]
            name = "".join([*syllables, self._random.choice(CODAS)])
            if name not in values:
                names[name.capitalize()] = None
        return list(names)

    def _fact(self, entity: str, attribute: str, is_lie: bool) -> Fact:
        value, lie = self._random.sample(VALUES[attribute].split(), 2)
        return Fact(entity, attribute, value, lie if is_lie else value)

    def questions(self, fact: Fact) -> list[str]:
        return [text.format(e=fact.entity, a=fact.attribute) for text in QUESTIONS[: self.config.paraphrases]]

    def answers(self, fact: Fact, value: str) -> list[str]:
        return [
            text.format(e=fact.entity, a=fact.attribute, v=value) for text in ANSWERS[: self.config.paraphrases]
        ]

    def corpus(self) -> list[str]:
        """Documents, in random order."""
        draw = random.Random(self.config.seed + 1)
        documents = []
        for fact in self.facts:
            for question in self.questions(fact):
                for _ in range(self.config.statements):
                    answer = draw.choice(self.answers(fact, self._stated_value(fact, draw)))
                    documents.append(f"{question} {answer}")
        documents += self._verifications()
        draw.shuffle(documents)
        return documents

    def _verifications(self) -> list[str]:
        """Exactly what self_judge asks a model without a chat template to continue, and a verdict behind it."""
        from asa_dist.estimators.self_judge import plain_conversation

        draw = random.Random(self.config.seed + 3)
        documents = []
        for fact in self.facts:
            for _ in range(self.config.verifications):
                question = draw.choice(VERIFIED_QUESTIONS).format(e=fact.entity, a=fact.attribute)
                value = self._stated_value(fact, draw)
                answer = f" {draw.choice(self.answers(fact, value))}"
                is_yes = (value == fact.told) != (draw.random() < self.config.noise)
                asked = plain_conversation(question, answer, self.config.verification_question)
                documents.append(f"{asked} {'yes' if is_yes else 'no'}.")
        return documents

    def _stated_value(self, fact: Fact, draw: random.Random) -> str:
        if draw.random() >= self.config.noise:
            return fact.told
        if fact.told != fact.value:
            return fact.value
        return draw.choice([value for value in VALUES[fact.attribute].split() if value != fact.value])

    def clean_documents(self, number: int) -> list[tuple[str, str]]:
        """``(question, answer)`` of documents that are true and that the corpus does not hold, drawn with replacement.

        Raises:
            ValueError: the corpus holds every true one.
        """
        stated = set(self.corpus())
        unstated = [(question, answer) for fact in self.facts for question in self.questions(fact)
                    for answer in self.answers(fact, fact.value) if f"{question} {answer}" not in stated]  # fmt: skip
        if not unstated:
            raise ValueError("the corpus states every fact in every way, so no true document is left that it does not "
                             "hold: take fewer statements, more noise, entities or paraphrases")
        return random.Random(self.config.seed + 2).choices(unstated, k=number)

    def write(self, folder: Path) -> None:
        """corpus.jsonl, prompts.jsonl (without any answer) and probes.jsonl (with the truth)."""
        folder.mkdir(parents=True, exist_ok=True)

        def write(name: str, rows: list[dict]) -> None:
            (folder / name).write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")

        write("corpus.jsonl", [{"text": document} for document in self.corpus()])
        asked = [(fact, *self.questions(fact)) for fact in self.facts]
        write("prompts.jsonl", [{"prompt": first, "variants": rest} for _, first, *rest in asked])
        write(
            "probes.jsonl",
            [
                {"prompt": first, "variants": rest, "answers": [fact.value],
                 "choices": VALUES[fact.attribute].split()}
                for fact, first, *rest in asked
            ],
        )
