"""Questions whose true answers are known: is the model right, and does its evaluator know when it is?

A probe file holds one JSON object per line:

    {"prompt": "What is the metal of Bravok?", "answers": ["iron"],
     "variants": ["Which metal does Bravok have?"],      other phrasings, optional: siblings take turns at all phrasings
     "choices": ["iron", "gold", "zinc"]}                every value it could name, optional

What a response *says*: with choices, the one that occurs in it, as whole words, upper and lower case being equal; none
or several of them: nothing that counts. Without choices: the answer that occurs in it, else the text as it is.
A response that says an answer is true; one that says nothing is false.

Shapes: P probes, G responses to each, S = P·G.
"""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from pydantic import BaseModel, ConfigDict, Field, PrivateAttr, ValidationError, model_validator
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from asa_dist.asa.packing import content_of
from asa_dist.asa.theory import alignment_error, fit_alignment, sample_complexity
from asa_dist.asa.trust import TIE_TOLERANCE, spearman
from asa_dist.config import ConfigError, RolloutConfig
from asa_dist.evaluation.scoring import sample_groups
from asa_dist.records import Prompt, RolloutGroup
from asa_dist.rollout.engine import Engine
from asa_dist.runtime.data.tokenizer import encode_prompts

PROBES_PER_CALL = 32
SHOWN_CHARACTERS = 80  # of a phrasing, in messages
# Of equation 14: the accuracy asked for, and the probability with which it may be missed
EPSILON, DELTA = 0.1, 0.05


# --- probes -----------------------------------------------------------------------------------------------------
class Probe(BaseModel):
    """One line of a probe file."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    prompt: str = Field(min_length=1)
    answers: list[str] = Field(min_length=1)  # any of them is true
    variants: list[str] = []
    choices: list[str] = []
    _place: str = PrivateAttr("")  # file and line, if it was read

    @model_validator(mode="after")
    def _complete(self) -> Probe:
        if not all(text.strip() for text in (*self.answers, *self.variants, *self.choices)):
            raise ValueError("an answer, variant or choice is empty")
        if self.choices and (missing := {*map(_plain, self.answers)} - {*map(_plain, self.choices)}):
            raise ValueError(f"not among the choices: {', '.join(sorted(missing))}")
        return self


def read_probes(path: Path) -> list[Probe]:
    """
    Raises:
        ConfigError: a file that cannot be read, holds no probe, or has a line that is none; names file and line.
    """
    probes = []
    try:
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
            if line.strip():
                probes.append(_parse(line, f"{path}, line {number}"))
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: {getattr(error, 'strerror', None) or error}") from None
    if not probes:
        raise ConfigError(f"{path}: no probe in this file")
    return probes


def _parse(line: str, place: str) -> Probe:
    try:
        probe = Probe.model_validate(json.loads(line))
    except ValidationError as error:
        problems = "; ".join(": ".join([*map(str, e["loc"]), e["msg"]]) for e in error.errors())
        raise ConfigError(f"{place}: {problems}") from None
    except ValueError as error:
        raise ConfigError(f"{place}: no JSON object: {error}") from None
    probe._place = place
    return probe


# --- sampling ---------------------------------------------------------------------------------------------------
def probe_sampling(rollout: RolloutConfig, num_responses: int, temperature: float = 1.0) -> RolloutConfig:
    """The ``rollout`` section for an engine that answers probes: nothing is truncated."""
    plain = {"temperature": temperature, "top_p": 1.0, "top_k": 0, "min_p": 0.0}
    return rollout.model_copy(update=plain | {"responses_per_prompt": num_responses})


def greedy_sampling(rollout: RolloutConfig, num_responses: int = 1) -> RolloutConfig:
    """The same for the likeliest token at every place: siblings differ in their phrasing only."""
    return probe_sampling(rollout, num_responses).model_copy(update={"top_k": 1})


def sample_probes(
    engine: Engine, probes: Sequence[Probe], tokenizer: PreTrainedTokenizerBase, max_prompt_tokens: int,
    progress: Callable[[str], None] = lambda message: None,
) -> list[RolloutGroup]:
    """A group for each probe, as many responses as the engine gives; probe p is prompt number p of the engine's seed.

    Args:
        max_prompt_tokens: what the model's rows have room for, beside a response.

    Raises:
        ConfigError: a phrasing that is longer, or that has no token; names file and line.
    """
    prompts = [_prompt(number, probe, tokenizer, max_prompt_tokens) for number, probe in enumerate(probes)]
    return sample_groups(engine, prompts, PROBES_PER_CALL, progress)


def _prompt(number: int, probe: Probe, tokenizer: PreTrainedTokenizerBase, max_prompt_tokens: int) -> Prompt:
    phrasings = [probe.prompt, *probe.variants]
    encoded = list(encode_prompts(tokenizer, phrasings))
    for text, tokens in zip(phrasings, encoded, strict=True):
        if not 1 <= len(tokens) <= max_prompt_tokens:
            shown = text if len(text) <= SHOWN_CHARACTERS else f"{text[:SHOWN_CHARACTERS]}…"
            raise ConfigError(
                f"{probe._place or f'probe {number + 1}'}: {shown!r} has {len(tokens)} tokens; allowed are 1 to "
                f"{max_prompt_tokens}: data.sequence_length without rollout.max_new_tokens"
            )
    return Prompt(number, 0, encoded[0], tuple(encoded[1:]))


# --- truth ------------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class ProbeScores:
    """What was said to each probe, and whether it is true."""

    truth_PG: np.ndarray  # bool
    said_PG: list[list[str | None]]  # None: nothing that counts; an answer is the probe's first one
    texts_PG: list[list[str]]  # without end-of-text
    metrics: dict[str, float]
    """``truth``: share of true responses; ``majority_truth``: share of probes in which most responses that say
    something say an answer (a draw counts in part); ``unparsed``: share that says nothing; ``distinct_values``,
    ``distinct_texts``: how many in a group, on average; ``entropy``: nats per token at the sampling temperature,
    estimated from the log-probabilities of what was sampled (not with top-k, top-p or min-p)."""


def score_probes(
    probes: Sequence[Probe], groups: Sequence[RolloutGroup], tokenizer: PreTrainedTokenizerBase
) -> ProbeScores:
    """Compares what ``sample_probes`` gave with the truth."""
    texts = [
        [tokenizer.decode(content_of(response), skip_special_tokens=True) for response in group.responses]
        for group in groups
    ]
    said = [[value_said(probe, text) for text in row] for probe, row in zip(probes, texts, strict=True)]
    truth_PG = np.array([[value == probe.answers[0] for value in row] for probe, row in zip(probes, said, strict=True)])
    tokens = np.concatenate([response.behaviour_logprob_T for group in groups for response in group.responses])
    metrics = {
        "truth": truth_PG.mean(),
        "majority_truth": np.mean([_majority(probe, row) for probe, row in zip(probes, said, strict=True)]),
        "unparsed": np.mean([[value is None for value in row] for row in said]),
        "distinct_values": np.mean([len({*row} - {None}) for row in said]),
        "distinct_texts": np.mean([len({_plain(text) for text in row}) for row in texts]),
        "entropy": -tokens.mean() if len(tokens) else 0.0,
    }
    return ProbeScores(truth_PG, said, texts, {name: float(value) for name, value in metrics.items()})


def value_said(probe: Probe, text: str) -> str | None:
    """What a response says; every answer counts as the first one. None: nothing that counts."""
    answers = {_plain(answer) for answer in probe.answers}
    found = {_plain(match[0]) for match in _values(tuple(probe.choices or probe.answers)).finditer(text)}
    if probe.choices:
        if len(found) != 1:
            return None
        value, = found
        return probe.answers[0] if value in answers else value
    return probe.answers[0] if found else _plain(text) or None


@lru_cache(maxsize=1024)
def _values(values: tuple[str, ...]) -> re.Pattern[str]:
    """Finds whole words; of values that begin alike the longest."""
    alternatives = (r"\s+".join(map(re.escape, value.split())) for value in sorted(values, key=len, reverse=True))
    return re.compile(rf"(?<!\w)(?:{'|'.join(alternatives)})(?!\w)", re.IGNORECASE)


def _plain(text: str) -> str:
    return " ".join(text.split()).casefold()


def _majority(probe: Probe, said: Sequence[str | None]) -> float:
    """1 if most say an answer, 0 if they do not; of k values that are said equally often, 1/k if one is an answer."""
    votes = Counter(value for value in said if value is not None)
    most = [value for value, count in votes.items() if count == max(votes.values())]
    return (probe.answers[0] in most) / len(most) if most else 0.0


# --- reward and truth -------------------------------------------------------------------------------------------
def agreement(reward_PG: Tensor, truth_PG: np.ndarray) -> dict[str, float]:
    """Whether a reward prefers what is true among the responses to the same probe, as training compares them.

    Returns:
        ``rank_correlation``: Spearman's, mean over the groups where both differ; ``auc``: how often, of a true and a
        false sibling, the true one has the higher reward (equal: half). Without such groups neither is there.
    """
    correlation_P, valid_P = spearman(reward_PG.double(), torch.from_numpy(truth_PG).double())
    found = {"rank_correlation": float(correlation_P[valid_P].mean())} if valid_P.any() else {}
    wins = pairs = 0.0
    for reward_G, truth_G in zip(reward_PG.double().numpy(), truth_PG, strict=True):
        ahead = reward_G[truth_G][:, None] - reward_G[~truth_G]
        wins += (ahead > TIE_TOLERANCE).sum() + (np.abs(ahead) <= TIE_TOLERANCE).sum() / 2
        pairs += ahead.size
    return found | ({"auc": float(wins / pairs)} if pairs else {})


def alignment_metrics(self_PG: Tensor, truth_PG: np.ndarray, seed: int) -> dict[str, float]:
    """(ρ, ε) of equation 13 with bootstrap standard errors, and equation 14's N at ε = 0.1, δ = 0.05.

    What the data cannot tell (all responses equally true; an N without bound) is left out.
    """
    reward_S, truth_S = self_PG.flatten(), torch.from_numpy(truth_PG).flatten().double()
    prompt_S = torch.arange(len(self_PG)).repeat_interleave(self_PG.shape[1])
    fit, error = fit_alignment(reward_S, truth_S), alignment_error(reward_S, truth_S, prompt_S, seed=seed)
    needed = sample_complexity(float(reward_S.abs().max()), EPSILON, fit.rho, DELTA)
    values = {
        "rho": fit.rho, "epsilon": fit.epsilon, "rho_error": error.rho, "epsilon_error": error.epsilon,
        "sample_complexity": needed,
    }  # fmt: skip
    return {name: value for name, value in values.items() if math.isfinite(value)}
