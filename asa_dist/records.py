"""What crosses a process boundary: small frozen records, no behaviour beyond their own consistency.

Shapes: T tokens of one response, N tokens of one prompt, G responses per prompt, K phrasings of a prompt. Token ids are
int32, log-probabilities float32. A *policy version* v is the weights after v optimizer steps; step s (counted from 0)
trains version s into s + 1.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Prompt:
    """One prompt of the rollout stream; ``(epoch, prompt_id)`` also keys its sampling noise.

    It may be put in K = 1 + ``len(variants)`` phrasings: siblings take turns, sibling g answers phrasing g mod K.
    """

    prompt_id: int
    epoch: int
    token_ids: np.ndarray  # int32 [N], N ≥ 1: phrasing 0
    variants: tuple[np.ndarray, ...] = ()  # int32 [N] each, of its own N ≥ 1: phrasings 1 … K − 1

    @property
    def phrasings(self) -> tuple[np.ndarray, ...]:
        """All K, int32 [N] each."""
        return (self.token_ids, *self.variants)

    def variant_of(self, sibling: int) -> int:
        """Number of the phrasing, 0 … K − 1, that this sibling (0 … G − 1) answers."""
        return sibling % (1 + len(self.variants))

    def tokens_for(self, sibling: int) -> np.ndarray:
        """The phrasing that this sibling (0 … G − 1) answers, int32 [N]."""
        return self.phrasings[self.variant_of(sibling)]


@dataclass(frozen=True)
class Response:
    """One sampled continuation. ``token_ids`` ends with end-of-text if ``finished``; it may be empty."""

    token_ids: np.ndarray  # int32 [T]
    logprob_T: np.ndarray  # float32, at temperature 1
    behaviour_logprob_T: np.ndarray  # float32, at the sampling temperature, before truncation (top-p, top-k, min-p)
    finished: bool  # end-of-text was sampled; False = cut off at max_new_tokens
    spans: tuple[tuple[int, int], ...]  # (first token, policy version), ascending: weights may change in flight

    @property
    def oldest_version(self) -> int:
        return min(version for _, version in self.spans)

    @property
    def nbytes(self) -> int:
        return self.token_ids.nbytes + self.logprob_T.nbytes + self.behaviour_logprob_T.nbytes


@dataclass(frozen=True)
class RolloutGroup:
    """G responses to one prompt, the unit of scoring: never split over ranks or micro-batches."""

    step: int  # the step that trains on it
    index: int  # place in the step's global batch, 0 … P − 1
    prompt: Prompt
    responses: tuple[Response, ...]

    @property
    def oldest_version(self) -> int:
        return min(response.oldest_version for response in self.responses)

    @property
    def nbytes(self) -> int:
        num_bytes = sum(token_ids.nbytes for token_ids in self.prompt.phrasings)
        return num_bytes + sum(response.nbytes for response in self.responses)


@dataclass(frozen=True)
class Lease:
    """A fixed bundle of consecutive groups handed to one worker, the same after every reissue."""

    lease_id: int
    step: int
    first_index: int
    prompts: tuple[Prompt, ...]
    min_version: int  # oldest policy version that may serve it


@dataclass(frozen=True)
class OpenStep:
    """A step that was submitted and not yet taken by all ranks."""

    step: int
    prompts: tuple[Prompt, ...]  # all P, in order
    groups: tuple[RolloutGroup, ...]  # finished ones, by ascending index; the other prompts are still to be answered


@dataclass(frozen=True)
class LedgerSnapshot:
    """Everything about rollouts that a checkpoint holds: size O(open groups), whatever the length of the run."""

    next_step: int  # all steps before it were taken
    steps: tuple[OpenStep, ...]  # ascending


@dataclass(frozen=True)
class TensorSpec:
    """One published tensor, under its transformers name."""

    name: str
    shape: tuple[int, ...]
    shard_numel: int  # elements of one rank's shard: ceil(numel / number of ranks); the last shards are padded

    @property
    def numel(self) -> int:
        return int(np.prod(self.shape, dtype=np.int64))


@dataclass(frozen=True)
class ShardRecord:
    """One rank's shard: its pieces of every tensor, concatenated in manifest order."""

    rank: int
    num_bytes: int
    checksum: str  # xxh3_128, hexadecimal


@dataclass(frozen=True)
class WeightManifest:
    """Completes a policy version: with it, and the shards it names, the version can be served."""

    version: int
    dtype: str  # "float32" | "bfloat16"
    tensors: tuple[TensorSpec, ...]
    shards: tuple[ShardRecord, ...]  # one per rank, in rank order


@dataclass(frozen=True)
class TextPrompt:
    """What UDASA measures: a prompt as people read it, and as the model does."""

    prompt_id: int  # place in the prompt file, from 0
    text: str  # without a chat template: what the estimators read
    token_ids: np.ndarray  # int32 [T], T ≥ 1: what stands before a response in training, chat template applied
    instruction_token_ids: np.ndarray | None = None  # int32 [T]: the same of `one_prompt.instruction`, if used


@dataclass(frozen=True)
class MeasuredResponse:
    """One response and what is known of it; None = not measured."""

    text: str
    token_ids: np.ndarray  # int32 [T], with the end-of-text if ``finished``
    finished: bool
    u_semantic: float | None
    u_factual: float | None
    u_value: float | None
    u_total: float | None  # None if one of those that the config asks for is

    def __post_init__(self) -> None:
        if broken := {name: value for name, value in self.uncertainties.items() if not math.isfinite(value)}:
            raise ValueError(f"uncertainties of {self.text[:80]!r} must be finite, or None if not measured: {broken}")

    @property
    def uncertainties(self) -> dict[str, float]:
        """Those measured, by name: semantic, factual, value, total."""
        named = {"semantic": self.u_semantic, "factual": self.u_factual, "value": self.u_value, "total": self.u_total}
        return {name: value for name, value in named.items() if value is not None}


def unmeasured(text: str, token_ids: np.ndarray, finished: bool) -> MeasuredResponse:
    """A response of which nothing is known yet."""
    return MeasuredResponse(text, token_ids, finished, None, None, None, None)


@dataclass(frozen=True)
class MeasuredPrompt:
    """A prompt with all N responses."""

    prompt_id: int
    prompt: str
    token_ids: np.ndarray  # int32 [T]
    policy_version: int  # of the weights that responded: in UDASA the round, from 0
    seed: int  # of the run: sampling and the choice of y⁻ descend from it
    responses: tuple[MeasuredResponse, ...]


@dataclass(frozen=True)
class PreferencePair:
    """What one DPO example is made of, and where it comes from."""

    prompt_id: int
    prompt: str
    prompt_token_ids: np.ndarray  # int32 [T]
    chosen: MeasuredResponse
    rejected: MeasuredResponse
    chosen_index: int  # among the prompt's N responses
    rejected_index: int
    delta_u: float  # u_total of the rejected one minus that of the chosen one, > 0
    policy_version: int
    seed: int
