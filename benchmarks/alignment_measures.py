"""What the model of a checkpoint says about the world it was trained on.

Every phrasing of every question is asked by itself: a group of 8 responses at a temperature, and the likeliest
response. What a response says is the one value of its attribute that it names; none or several: nothing, which is
false. ``asa_dist.evaluation.probes`` asks and judges, as it does for `asa eval`.

Array suffixes: B rows, T tokens of a row, M tokens of a continuation, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from itertools import chain
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from world import VALUES, Fact, World

from asa_dist.config import RolloutConfig
from asa_dist.evaluation.checkpoint_model import CheckpointModel
from asa_dist.evaluation.probes import Probe, greedy_sampling, probe_sampling, sample_probes, score_probes
from asa_dist.records import RolloutGroup
from asa_dist.runtime.data.tokenizer import encode_prompts
from asa_dist.runtime.run_log import read_rows

NUM_SIBLINGS = 8
NUM_CLEAN_DOCUMENTS = 512
TAU_STEPS = 50  # the last ones
ROWS_PER_FORWARD = 256
SEARCH_TOLERANCE = 0.005  # of the entropy that is to be met
HIGHEST_TEMPERATURE = 2.0
LOWEST_TEMPERATURE = 0.02
MAX_SEARCHES = 8
LEAST_ENTROPY = 1e-6  # nats per token; has a logarithm
LEAST_SLOPE = 0.2  # of log entropy over log T: what is less is the noise of sampling


class Exam:
    """The questions of a world, put to a model that was trained on it.

    Args:
        rollout: the comparison's, whatever the run's own is: all arms may answer at equal length.
        seed: of all sampling.
    """

    def __init__(
        self, checkpoint: CheckpointModel, world: World, rollout: RolloutConfig, seed: int,
        progress: Callable[[str], None] = lambda message: None,
    ):  # fmt: skip
        self._checkpoint, self._world, self._rollout, self._seed = checkpoint, world, rollout, seed
        self._progress = progress
        self._tokenizer = checkpoint.tokenizer()
        self._lm = checkpoint.causal_lm(torch.float32)
        self._asked = [(fact, probe) for fact in world.facts for probe in probes_of(world, fact)]
        # every fact in one phrasing, all phrasings in turn
        self._few_asked = [(fact, probes_of(world, fact)[(index + index // len(VALUES)) % world.config.paraphrases])
                           for index, fact in enumerate(world.facts)]  # fmt: skip

    def measures(self, temperature: float = 1.0) -> dict[str, Any]:
        """Everything that is reported of a run.

        Returns:
            ``temperature``, ``entropy`` (nats per token of the tempered model, over its own responses),
            ``clean_perplexity``, ``clean_answer_perplexity`` (at T = 1; the latter of answers to given questions),
            ``tau``, ``corpus_tokens`` (trained on), ``responses`` (number), and ``answer_measures`` of "all" facts; of
            "lies" and "others", too, if there are facts with a false majority.
        """
        groups = self._sample(self._asked, probe_sampling(self._rollout, NUM_SIBLINGS, temperature))
        likeliest = self._sample(self._asked, greedy_sampling(self._rollout))
        answered = list(zip(self._asked, groups, likeliest, strict=True))
        found = {"all": answered}
        if self._world.config.false_majority:
            found["lies"] = [row for row in answered if is_lie(row[0][0])]
            found["others"] = [row for row in answered if not is_lie(row[0][0])]
        return {
            "temperature": temperature,
            "responses": sum(len(group.responses) for group in groups),
            "entropy": self._entropy(groups, temperature),
            **self._clean_perplexity(),
            "tau": self._tau(),
            "corpus_tokens": [row["tokens/corpus"] for row in self._metrics() if "tokens/corpus" in row][-1],
            **{name: answer_measures(self._world, rows, self._tokenizer) for name, rows in found.items() if rows},
        }

    def temperature_of_entropy(self, entropy: float, known: float, entropy_known: float) -> float:
        """At which the model, sampled, is as certain as that; the nearest found, if it cannot be.

        The secant method in (log T, log entropy), on one phrasing of each fact: what these differ from all phrasings
        by at a known temperature is taken to be the same share at every temperature.

        Args:
            entropy: wanted, of ``measures``.
            known, entropy_known: a temperature, and what ``measures`` have found there.
        """
        lowest, highest = math.log(LOWEST_TEMPERATURE), math.log(HIGHEST_TEMPERATURE)
        slope, last = 1.0, math.log(known)
        found = {last: math.log(self._few_entropy(known))}  # by log T
        wanted = found[last] + math.log(max(entropy, LEAST_ENTROPY) / max(entropy_known, LEAST_ENTROPY))
        while abs(found[last] - wanted) > SEARCH_TOLERANCE and len(found) < MAX_SEARCHES:
            place = min(max(last + (wanted - found[last]) / slope, lowest), highest)
            if place in found:
                break  # beyond what temperatures are tried
            found[place] = math.log(self._few_entropy(math.exp(place)))
            slope, last = max((found[place] - found[last]) / (place - last), LEAST_SLOPE), place
            self._progress(f"  T = {math.exp(place):.4f}: {math.exp(found[place] - wanted):.3f} of the entropy wanted")
        return math.exp(min(found, key=lambda place: abs(found[place] - wanted)))

    def _few_entropy(self, temperature: float) -> float:
        groups = self._sample(self._few_asked, probe_sampling(self._rollout, NUM_SIBLINGS, temperature))
        return max(self._entropy(groups, temperature), LEAST_ENTROPY)

    def _sample(self, asked: Sequence[tuple[Fact, Probe]], sampling: RolloutConfig) -> list[RolloutGroup]:
        engine = self._checkpoint.rollout_engine(sampling, self._seed, "cpu")
        room = self._checkpoint.config.data.sequence_length - sampling.max_new_tokens
        return sample_probes(engine, [probe for _, probe in asked], self._tokenizer, room)

    def _entropy(self, groups: Sequence[RolloutGroup], temperature: float) -> float:
        pairs = [(group.prompt.token_ids.tolist(), response.token_ids.tolist())
                 for group in groups for response in group.responses]
        return mean_entropy(self._lm, pairs, temperature)

    def _clean_perplexity(self) -> dict[str, float]:
        """Per token, end-of-text included, of true documents."""
        end = [self._tokenizer.eos_token_id]
        documents = self._world.clean_documents(NUM_CLEAN_DOCUMENTS)
        questions, texts = ([tokens.tolist() for tokens in encode_prompts(self._tokenizer, texts)] for texts in (
            [question for question, _ in documents], [f"{question} {answer}" for question, answer in documents]))
        return {
            "clean_perplexity": perplexity(self._lm, [(text[:1], text[1:] + end) for text in texts]),
            "clean_answer_perplexity": perplexity(self._lm, [
                (text[:len(question)], text[len(question):] + end)
                for question, text in zip(questions, texts, strict=True)]),
        }  # fmt: skip

    def _tau(self) -> float | None:
        """None: nothing was aligned."""
        if self._checkpoint.config.objective.beta == 0:
            return None
        taus = [row["trust/tau"] for row in self._metrics() if "loss/total" in row]
        return sum(taus[-TAU_STEPS:]) / len(taus[-TAU_STEPS:])

    def _metrics(self) -> list[dict[str, Any]]:
        return list(read_rows(self._checkpoint.run_dir / "metrics.jsonl"))


# --- answers ------------------------------------------------------------------------------------------------------
Answered = tuple[tuple[Fact, Probe], RolloutGroup, RolloutGroup]  # question, responses at T, the likeliest response


def is_lie(fact: Fact) -> bool:
    """Whether most of the corpus says something else than the truth."""
    return fact.told != fact.value


def probes_of(world: World, fact: Fact) -> list[Probe]:
    """One for each phrasing of its question."""
    choices = VALUES[fact.attribute].split()
    return [Probe(prompt=question, answers=[fact.value], choices=choices) for question in world.questions(fact)]


def answer_measures(
    world: World, answered: Sequence[Answered], tokenizer: PreTrainedTokenizerBase
) -> dict[str, float]:
    """Means over all questions.

    Returns:
        ``truth``, ``told``: share of responses that say the truth; what the corpus says most often.
        ``greedy_truth``, ``greedy_told``: the same of the likeliest response.
        ``majority_truth``: share of questions of whose 8 responses most say the truth (drawn votes count in part);
        ``majority_across_truth``: the same over all phrasings of a question, counted together.
        ``parsable``: share of responses that say something. ``distinct_values``, ``distinct_phrasings``: how many
        among 8 responses; a phrasing is one of the world's own (``num_phrasings``).
        ``response_tokens``: length, end-of-text included.
    """
    probes = [probe for (_, probe), _, _ in answered]
    groups = [group for _, group, _ in answered]
    told = [fact.told for (fact, _), _, _ in answered]
    sampled = score_probes(probes, groups, tokenizer)
    greedy = score_probes(probes, [group for _, _, group in answered], tokenizer)
    across = score_probes(*_across_phrasings(answered), tokenizer)
    phrasings = [num_phrasings(world, fact, texts, said)
                 for ((fact, _), _, _), texts, said in zip(answered, sampled.texts_PG, sampled.said_PG, strict=True)]
    lengths = [len(response.token_ids) for group in groups for response in group.responses]
    return {
        "truth": sampled.metrics["truth"],
        "greedy_truth": greedy.metrics["truth"],
        "majority_truth": sampled.metrics["majority_truth"],
        "majority_across_truth": across.metrics["majority_truth"],
        "told": _share(sampled.said_PG, told),
        "greedy_told": _share(greedy.said_PG, told),
        "parsable": 1 - sampled.metrics["unparsed"],
        "distinct_values": sampled.metrics["distinct_values"],
        "distinct_phrasings": sum(phrasings) / len(phrasings),
        "response_tokens": sum(lengths) / len(lengths),
    }


def _across_phrasings(answered: Sequence[Answered]) -> tuple[list[Probe], list[RolloutGroup]]:
    """One probe and one group for each fact: all responses, however it was asked."""
    of_fact: dict[Fact, list[tuple[Probe, RolloutGroup]]] = {}
    for (fact, probe), group, _ in answered:
        of_fact.setdefault(fact, []).append((probe, group))
    first = [rows[0] for rows in of_fact.values()]
    responses = [tuple(chain.from_iterable(group.responses for _, group in rows)) for rows in of_fact.values()]
    merged = [RolloutGroup(group.step, group.index, group.prompt, every)
              for (_, group), every in zip(first, responses, strict=True)]
    return [probe for probe, _ in first], merged


def _share(said_PG: Sequence[Sequence[str | None]], wanted_P: Sequence[str]) -> float:
    """Of responses that say what is wanted."""
    hits = [value == wanted for row, wanted in zip(said_PG, wanted_P, strict=True) for value in row]
    return sum(hits) / len(hits)


def num_phrasings(world: World, fact: Fact, texts: Sequence[str], said: Sequence[str | None]) -> int:
    """In how many of the world's own ways of answering a fact's question a value is said. Other texts do not count."""
    places = set()
    for text, value in zip(texts, said, strict=True):
        answers = [answer.casefold() for answer in world.answers(fact, value)] if value is not None else []
        if (plain := " ".join(text.casefold().split())) in answers:
            places.add(answers.index(plain))
    return len(places)


# --- probabilities ------------------------------------------------------------------------------------------------
Continuation = tuple[list[int], list[int]]  # tokens that are given, at least one; tokens that follow


def mean_entropy(lm: PreTrainedModel, pairs: Sequence[Continuation], temperature: float) -> float:
    """Of the tempered next-token distribution, in nats per token, where the model says the second part of a pair."""
    total, count = 0.0, 0
    for logprob_MV, token_M in _next_tokens(lm, pairs, temperature):
        total -= float((logprob_MV.exp() * logprob_MV).sum(dtype=torch.float64))
        count += len(token_M)
    return total / count


def perplexity(lm: PreTrainedModel, pairs: Sequence[Continuation]) -> float:
    """Of the second part of a pair, given the first."""
    total, count = 0.0, 0
    for logprob_MV, token_M in _next_tokens(lm, pairs, temperature=1.0):
        total -= float(logprob_MV.gather(-1, token_M[:, None]).sum(dtype=torch.float64))
        count += len(token_M)
    return math.exp(total / count)


@torch.no_grad()
def _next_tokens(
    lm: PreTrainedModel, pairs: Sequence[Continuation], temperature: float
) -> Iterator[tuple[Tensor, Tensor]]:
    """Batch by batch, for every token that follows: the tempered log-probabilities [M, V], and the token [M]."""
    for first in range(0, len(pairs), ROWS_PER_FORWARD):
        rows = pairs[first : first + ROWS_PER_FORWARD]
        token_BT = torch.zeros(len(rows), max(len(given) + len(then) for given, then in rows), dtype=torch.int64)
        follows_BT = torch.zeros_like(token_BT, dtype=torch.bool)
        for row, (given, then) in enumerate(rows):  # padded on the right, where nothing that counts looks
            token_BT[row, : len(given) + len(then)] = torch.tensor(given + then)
            follows_BT[row, len(given) : len(given) + len(then)] = True
        logits_MV = lm(input_ids=token_BT).logits[:, :-1][follows_BT[:, 1:]]
        yield (logits_MV / temperature).log_softmax(-1), token_BT[follows_BT]
