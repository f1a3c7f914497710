"""Random groups for tests: odd sizes, empty, single-claim and all-equal responses."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from asa_dist.asa.packing import TextTables
from asa_dist.records import Prompt, Response, RolloutGroup

VOCAB, EOS = 97, 0
TABLES = TextTables(
    claim_end_V=np.isin(np.arange(VOCAB), [3, 5, 7, 11]),
    sentence_end_V=np.isin(np.arange(VOCAB), [3, 5]),
    blank_V=np.isin(np.arange(VOCAB), [EOS, 7]),
)


@dataclass(frozen=True)
class Shape:
    """What kind of response."""

    num_content: int
    finished: bool
    claim_every: int | None = None  # a claim end after every so many tokens; None: wherever the dice put one


def response(rng: np.random.Generator, shape: Shape, version: int = 0) -> Response:
    content = rng.integers(1, VOCAB, shape.num_content)
    if shape.claim_every is not None:
        content = np.where(TABLES.claim_end_V[content], 50, content)
        content[shape.claim_every - 1 :: shape.claim_every] = 3
    token_ids = np.concatenate([content, [EOS] * shape.finished]).astype(np.int32)
    return of_tokens(rng, token_ids, shape.finished, version)


def of_tokens(rng: np.random.Generator, token_ids: np.ndarray, finished: bool, version: int = 0) -> Response:
    logprob = -rng.exponential(2.0, len(token_ids)).astype(np.float32)
    behaviour = (logprob + rng.normal(0, 0.7, len(token_ids))).astype(np.float32)
    return Response(token_ids, logprob, behaviour, finished, ((0, version),))


def groups(rng: np.random.Generator, group_size: int, step: int = 0, num_variants: int = 0) -> list[RolloutGroup]:
    """Five groups: mixed, with empty ones, single-claim, all equal, all empty."""

    def mixed() -> list[Response]:
        return [response(rng, Shape(int(rng.integers(1, 30)), bool(rng.integers(2)))) for _ in range(group_size)]

    with_empty = mixed()
    with_empty[0] = response(rng, Shape(0, True))  # end-of-text at once
    with_empty[1] = response(rng, Shape(0, False))  # not a single token
    claims = [response(rng, Shape(9, True, claim_every=9 if i else 4)) for i in range(group_size)]
    tokens = rng.integers(1, VOCAB, 13).astype(np.int32)
    equal = [of_tokens(rng, tokens, finished=False) for _ in range(group_size)]
    empty = [response(rng, Shape(0, True)) for _ in range(group_size)]
    made = [
        RolloutGroup(
            step, index, Prompt(100 + index, 0, rng.integers(1, VOCAB, 1 + 3 * index).astype(np.int32)), tuple(members)
        )
        for index, members in enumerate([mixed(), with_empty, claims, equal, empty])
    ]
    return [replace(group, prompt=with_variants(rng, group.prompt, num_variants)) for group in made]


def with_variants(rng: np.random.Generator, prompt: Prompt, num_variants: int) -> Prompt:
    """The prompt in other phrasings, too, each of a length of its own."""
    lengths = rng.integers(1, 15, num_variants).tolist()
    return replace(prompt, variants=tuple(rng.integers(1, VOCAB, length).astype(np.int32) for length in lengths))
