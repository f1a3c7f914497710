"""Packs rollouts into rows of the corpus length and marks, token by token, what each position is for.

Every sequence is a response behind the phrasing of the prompt that it answers; several share a row, as segments that do
not attend to each other. Padding short responses beside long corpus rows would waste the step.

Two readings of "response": its *tokens* include a final end-of-text (log-probabilities, entropy, pooled embedding);
its *content* does not (emptiness, token overlap, n-grams, claims).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor

from asa_dist.records import Response, RolloutGroup

IGNORED = -100  # target of a position that predicts nothing
MIN_CLAIM_TOKENS = 3


@dataclass(frozen=True)
class TextTables:
    """What a token id means as text, [V] booleans."""

    claim_end_V: np.ndarray  # a claim ends after this token: . ! ? ; or newline
    sentence_end_V: np.ndarray  # its last visible character is . ! ?
    blank_V: np.ndarray  # no visible character


@dataclass(frozen=True)
class _TensorRecord:
    def to(self, device: torch.device) -> Self:
        """The same record with every tensor on ``device``."""
        moved = {}
        for field in fields(self):
            value = getattr(self, field.name)
            moved[field.name] = value.to(device) if isinstance(value, Tensor | _TensorRecord) else value
        return type(self)(**moved)


@dataclass(frozen=True)
class GroupTensors(_TensorRecord):
    """P groups of G responses, flattened to S = P·G where marked; N counts all tokens of the micro-batch's rows."""

    num_groups: int
    group_size: int
    num_claims: int
    predicts_N: Tensor  # int64: response whose token this position predicts, −1 = none
    says_N: Tensor  # int64: the same without its end-of-text: response whose content this position predicts
    response_N: Tensor  # int64: response this token belongs to, −1 = none
    prompt_N: Tensor  # int64: response before which this prompt token stands, −1 = none
    claim_N: Tensor  # int64: claim this token belongs to, −1 = none
    claim_response_C: Tensor  # int64: response of each claim; claims of a response are consecutive
    behaviour_logprob_N: Tensor  # float32, at predicting positions, at the sampling temperature; 0 elsewhere
    sampled_logprob_N: Tensor  # float32, the same at temperature 1
    content_PGT: Tensor  # int64, token ids, padded
    content_length_PG: Tensor  # int64
    length_PG: Tensor  # int64, tokens, end-of-text included
    finished_PG: Tensor  # bool
    ends_sentence_PG: Tensor  # bool: finished, and the last visible character is . ! ?
    prompt_id_P: Tensor  # int64
    age_P: Tensor  # float32, steps between the oldest weights used and the ones trained


@dataclass(frozen=True)
class MicroBatch(_TensorRecord):
    """Everything one forward needs: corpus rows first, rollout rows after them."""

    input_ids_RT: Tensor  # int64
    position_ids_RT: Tensor  # int64, restart at every segment
    segment_RT: Tensor  # int64, attention stays within equal numbers; −1 = padding
    target_RT: Tensor  # int64, next token to predict, IGNORED = none
    is_corpus_RT: Tensor  # bool
    groups: GroupTensors | None  # None: corpus only (evaluation)

    @property
    def responses(self) -> GroupTensors:
        """The groups of a micro-batch that has some."""
        assert self.groups is not None, "a micro-batch of corpus rows alone"
        return self.groups


def content_of(response: Response) -> np.ndarray:
    """Token ids without the final end-of-text."""
    return response.token_ids[:-1] if response.finished else response.token_ids


def claim_spans(content: np.ndarray, claim_end_V: np.ndarray) -> list[tuple[int, int]]:
    """(start, end) of each claim in ``content``; empty list when there is no span of MIN_CLAIM_TOKENS.

    A short span joins the one before it (the first one joins the one after); text after the last end is no claim.
    """
    spans: list[tuple[int, int]] = []
    start = 0
    for end in (np.flatnonzero(claim_end_V[content]) + 1).tolist():
        if end - start >= MIN_CLAIM_TOKENS:
            spans.append((start, end))
        elif spans:
            spans[-1] = (spans[-1][0], end)
        else:
            continue  # a short first span: its start is kept, so that it joins the next one
        start = end
    return spans


def _ends_sentence(response: Response, tables: TextTables) -> bool:
    visible = content_of(response)
    visible = visible[~tables.blank_V[visible]]
    return bool(response.finished and len(visible) and tables.sentence_end_V[visible[-1]])


def _assign_rows(lengths: Sequence[int], row_length: int) -> list[list[int]]:
    """First-fit decreasing: sequence indices of each row."""
    rows: list[list[int]] = []
    free: list[int] = []
    for index in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        place = next((r for r, room in enumerate(free) if room >= lengths[index]), None)
        if place is None:
            place = len(rows)
            rows.append([])
            free.append(row_length)
        rows[place].append(index)
        free[place] -= lengths[index]
    return rows


@dataclass(frozen=True)
class _Sequence:
    """One response behind the phrasing of its prompt that it answers."""

    prompt: np.ndarray
    response: Response
    claims: list[tuple[int, int]]  # spans of the content; the whole content if it has no claim

    @property
    def num_tokens(self) -> int:
        return len(self.prompt) + len(self.response.token_ids)


def pack_groups(
    groups: Sequence[RolloutGroup], row_length: int, tables: TextTables, version: int, group_size: int | None = None
) -> MicroBatch:
    """Rollout rows alone, as a MicroBatch without corpus rows.

    Args:
        groups: P groups of equal size, whose prompts have equally many phrasings; each prompt + response at most
            ``row_length`` tokens. None of them make one row of padding, for a rank that has nothing to train on.
        version: the policy version being trained, for the age of each group.
        group_size: G; has to be given where there may be no groups.

    Raises:
        ValueError: groups of unequal size or of unequal numbers of phrasings, a sequence longer than a row, or neither
            groups nor their size.
    """
    group_size = _size_of(groups, group_size)
    sequences = _sequences_of(groups, row_length, tables)
    rows = _assign_rows([sequence.num_tokens for sequence in sequences], row_length) or [[]]
    marks = _lay_out(sequences, rows, row_length)
    return MicroBatch(
        input_ids_RT=torch.from_numpy(marks["input_ids"]),
        position_ids_RT=torch.from_numpy(marks["position_ids"]),
        segment_RT=torch.from_numpy(marks["segment"]),
        target_RT=torch.from_numpy(marks["target"]),
        is_corpus_RT=torch.zeros((len(rows), row_length), dtype=torch.bool),
        groups=_group_tensors(groups, group_size, sequences, marks, tables, version),
    )


def _size_of(groups: Sequence[RolloutGroup], group_size: int | None) -> int:
    sizes = [len(group.responses) for group in groups] + ([] if group_size is None else [group_size])
    if not sizes:
        raise ValueError("no groups to pack: then group_size has to be given")
    if len(set(sizes)) > 1:
        raise ValueError(f"groups of unequal size: {sizes}")
    return sizes[0]


def _sequences_of(groups: Sequence[RolloutGroup], row_length: int, tables: TextTables) -> list[_Sequence]:
    phrasings = [len(group.prompt.phrasings) for group in groups]
    if len(set(phrasings)) > 1:
        raise ValueError(f"prompts with unequal numbers of phrasings: {phrasings}")
    sequences = []
    for group in groups:
        for sibling, response in enumerate(group.responses):
            content = content_of(response)
            whole = [(0, len(content))] if len(content) else []
            claims = claim_spans(content, tables.claim_end_V) or whole
            sequences.append(_Sequence(group.prompt.tokens_for(sibling), response, claims))
    longest = max((sequence.num_tokens for sequence in sequences), default=0)
    if longest > row_length:
        raise ValueError(f"a rollout of {longest} tokens does not fit a row of {row_length}")
    return sequences


def _lay_out(sequences: Sequence[_Sequence], rows: Sequence[Sequence[int]], row_length: int) -> dict[str, np.ndarray]:
    """Arrays [R, T]: what stands at each position, and what it is for."""
    fills = {"input_ids": 0, "position_ids": 0, "segment": -1, "target": IGNORED}
    fills |= {"predicts": -1, "says": -1, "response": -1, "prompt": -1, "claim": -1}
    shape = (len(rows), row_length)
    marks = {name: np.full(shape, fill, dtype=np.int64) for name, fill in fills.items()}
    marks |= {name: np.zeros(shape, dtype=np.float32) for name in ("behaviour_logprob", "sampled_logprob")}
    first_claim = np.cumsum([0] + [len(sequence.claims) for sequence in sequences])
    for row, members in enumerate(rows):
        start = 0
        for segment, index in enumerate(members):
            prompt, response = sequences[index].prompt, sequences[index].response
            begin, end = start + len(prompt), start + sequences[index].num_tokens
            marks["input_ids"][row, start:end] = np.concatenate([prompt, response.token_ids])
            marks["position_ids"][row, start:end] = np.arange(end - start)
            marks["segment"][row, start:end] = segment
            marks["prompt"][row, start:begin] = index
            marks["response"][row, begin:end] = index
            for number, (first, last) in enumerate(sequences[index].claims):
                marks["claim"][row, begin + first : begin + last] = first_claim[index] + number
            predicting = (row, slice(begin - 1, end - 1))
            marks["target"][predicting] = response.token_ids
            marks["predicts"][predicting] = index
            marks["says"][row, begin - 1 : begin - 1 + len(content_of(response))] = index
            marks["behaviour_logprob"][predicting] = response.behaviour_logprob_T
            marks["sampled_logprob"][predicting] = response.logprob_T
            start = end
    return marks


def _group_tensors(
    groups: Sequence[RolloutGroup],
    group_size: int,
    sequences: Sequence[_Sequence],
    marks: dict[str, np.ndarray],
    tables: TextTables,
    version: int,
) -> GroupTensors:
    responses = [sequence.response for sequence in sequences]
    contents = [content_of(response) for response in responses]
    padded = np.zeros((len(contents), max([1, *map(len, contents)])), dtype=np.int64)
    for index, content in enumerate(contents):
        padded[index, : len(content)] = content
    num_claims = np.array([len(sequence.claims) for sequence in sequences], dtype=np.int64)

    def per_position(name: str) -> Tensor:
        return torch.from_numpy(marks[name]).flatten()

    def per_response(values: Sequence[int], dtype: torch.dtype = torch.int64) -> Tensor:
        return torch.tensor(values, dtype=dtype).view(len(groups), group_size)

    return GroupTensors(
        num_groups=len(groups),
        group_size=group_size,
        num_claims=int(num_claims.sum()),
        predicts_N=per_position("predicts"),
        says_N=per_position("says"),
        response_N=per_position("response"),
        prompt_N=per_position("prompt"),
        claim_N=per_position("claim"),
        claim_response_C=torch.from_numpy(np.repeat(np.arange(len(sequences)), num_claims)),
        behaviour_logprob_N=per_position("behaviour_logprob"),
        sampled_logprob_N=per_position("sampled_logprob"),
        content_PGT=torch.from_numpy(padded).view(len(groups), group_size, padded.shape[1]),
        content_length_PG=per_response([len(content) for content in contents]),
        length_PG=per_response([len(response.token_ids) for response in responses]),
        finished_PG=per_response([response.finished for response in responses], torch.bool),
        ends_sentence_PG=per_response([_ends_sentence(response, tables) for response in responses], torch.bool),
        prompt_id_P=torch.tensor([group.prompt.prompt_id for group in groups], dtype=torch.int64),
        age_P=torch.tensor([float(version - group.oldest_version) for group in groups]),
    )


def corpus_batch(input_ids_RT: Tensor, position_ids_RT: Tensor, segment_RT: Tensor, target_RT: Tensor) -> MicroBatch:
    """Corpus rows alone."""
    return MicroBatch(
        input_ids_RT,
        position_ids_RT,
        segment_RT,
        target_RT,
        is_corpus_RT=torch.ones_like(input_ids_RT, dtype=torch.bool),
        groups=None,
    )


def join(corpus: MicroBatch, rollouts: MicroBatch) -> MicroBatch:
    """Corpus rows followed by rollout rows, in one batch."""
    groups = rollouts.groups
    if groups is None or corpus.groups is not None:
        raise ValueError("join takes corpus rows first and rollout rows second")
    num_corpus_tokens = corpus.input_ids_RT.numel()

    def shifted(values_N: Tensor, fill: float) -> Tensor:
        return torch.cat([torch.full((num_corpus_tokens,), fill, dtype=values_N.dtype), values_N])

    moved: dict[str, Any] = {
        name: shifted(getattr(groups, name), fill)
        for name, fill in (
            ("predicts_N", -1),
            ("says_N", -1),
            ("response_N", -1),
            ("prompt_N", -1),
            ("claim_N", -1),
            ("behaviour_logprob_N", 0.0),
            ("sampled_logprob_N", 0.0),
        )
    }
    rows = {
        name: torch.cat([getattr(corpus, name), getattr(rollouts, name)])
        for name in ("input_ids_RT", "position_ids_RT", "segment_RT", "target_RT", "is_corpus_RT")
    }
    return MicroBatch(**rows, groups=replace(groups, **moved))
