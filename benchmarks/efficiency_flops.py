"""Floating-point operations of one step of ASA-LLM and of what Table 2 of its paper compares it with, by formula.

All train the same trunk on the same corpus rows, and each of their stages sees as many responses as ASA-LLM trains on:
R = P·G, of n tokens with their prompts (p of the prompt, r of the response). L layers, H hidden, I of the gated MLP, Q
and K widths of all query and key heads, V vocabulary, D embedding of a response. Only matrix products count, a
multiplication and an addition as two; attention costs its whole square, masked or not.

    blocks(N, m)   = N·(2·W + 4·L·Q·m)      N tokens that each see m;  W = L·(2·H·Q + 2·H·K + 3·H·I)
    head(N)        = 2·N·H·V                logits of N tokens
    forward(s, n)  = blocks(s·n, n)         s sequences of n tokens
    train(s, n, N) = 3·forward(s, n) + 4·head(N)       backward = 2 forwards; logits are computed again there
    generate(q, c, p, r) = blocks(q·p, p) + head(q) + c·(blocks(r − 1, p + r/2) + head(r − 1))
                                            q prompts are read once, c answers decoded with a cache
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass

from asa_dist.config import Config
from asa_dist.plan import flops, shape

Terms = dict[str, float]  # "what: formula" → FLOPs


@dataclass(frozen=True)
class Trunk(shape.Trunk):
    """A Llama-style decoder and the evaluator's embedding; the formulas of its parts are those of `asa plan`."""

    embedding_size: int = 256

    @staticmethod
    def of(config: Config, vocab_size: int) -> Trunk:
        trunk = shape.trunk_of_shape(config.model.architecture, vocab_size)
        return Trunk(**asdict(trunk), embedding_size=config.evaluator.embedding_size)

    def forward(self, num_sequences: float, length: float) -> float:
        return flops.blocks(self, num_sequences * length, length)

    def head(self, num_tokens: float) -> float:
        return flops.head(self, num_tokens)

    def train(self, num_sequences: float, length: float, num_scored: float, head_passes: int = 4) -> float:
        return flops.train(self, num_sequences, length, num_scored, head_passes=head_passes)

    def generate(self, num_prompts: float, num_answers: float, prompt_tokens: float, new_tokens: float) -> float:
        decoded = num_answers * (new_tokens - 1)
        return flops.prefill(self, num_prompts, prompt_tokens) + flops.decode(
            self, decoded, prompt_tokens + new_tokens / 2)


@dataclass(frozen=True)
class Load:
    """One step's work.

    Args:
        template_tokens: of what a judge, a critic or a labeller is told beside prompt and response.
        verdict_tokens: that a judge or a critic writes.
        num_verdicts: per response, as Self-Rewarding LMs averages them.
        num_revisions: of a first answer, all trained on, as Constitutional AI does.
    """

    corpus_rows: float
    row_tokens: int
    prompts: float
    group_size: int
    prompt_tokens: int
    new_tokens: int
    template_tokens: int = 128
    verdict_tokens: int = 128
    num_verdicts: int = 3
    num_revisions: int = 4

    @staticmethod
    def of(config: Config) -> Load:
        rollout = config.rollout
        return Load(config.train.corpus_rows_per_step, config.data.sequence_length, rollout.prompts_per_step,
                    rollout.responses_per_prompt, rollout.max_prompt_tokens, rollout.max_new_tokens)

    @property
    def responses(self) -> float:
        return self.prompts * self.group_size

    @property
    def length(self) -> int:
        return self.prompt_tokens + self.new_tokens


def asa(trunk: Trunk, load: Load) -> Terms:
    """One forward and one backward, corpus and responses together; the heads read pooled states of its trunk."""
    size, pairs = trunk.embedding_size, load.responses * load.group_size
    return pretraining(trunk, load) | {
        "answers: generate(P, R, p, r)": sampling(trunk, load),
        "policy: train(R, n, R·r)": supervised(trunk, load),
        "heads: 6·R·H·D + 6·R·G·D": 6 * load.responses * trunk.hidden_size * size + 6 * pairs * size,
    }


def rlhf(trunk: Trunk, load: Load) -> Terms:
    """Supervised fine-tuning, a reward model of the trunk's size, PPO with one inner epoch and a critic of that size.

    The old policy's log-probabilities come with the answers, as ours do.
    """
    return pretraining(trunk, load) | {
        "demonstrations: train(R, n, R·r)": supervised(trunk, load),
        "answers for people to compare: generate(P, R, p, r)": sampling(trunk, load),
        "reward model: 3·forward(R, n)": 3 * trunk.forward(load.responses, load.length),
    } | ppo(trunk, load)


def ppo(trunk: Trunk, load: Load) -> Terms:
    read = trunk.forward(load.responses, load.length)
    return {
        "answers: generate(P, R, p, r)": sampling(trunk, load),
        "reference: forward(R, n) + head(R·r)": read + trunk.head(load.responses * load.new_tokens),
        "reward: forward(R, n)": read,
        "critic: forward(R, n) + 3·forward(R, n)": 4 * read,
        "policy: train(R, n, R·r)": supervised(trunk, load),
    }


def self_rewarding(trunk: Trunk, load: Load) -> Terms:
    """Fine-tuning, then of each prompt's G answers, judged by the model itself, the best and the worst for DPO."""
    chosen = 2 * load.prompts
    judged = trunk.generate(load.responses, load.responses * load.num_verdicts, load.template_tokens + load.length,
                            load.verdict_tokens)
    return pretraining(trunk, load) | {
        "demonstrations: train(R, n, R·r)": supervised(trunk, load),
        "answers: generate(P, R, p, r)": sampling(trunk, load),
        "judging: generate(R, 3·R, t + n, v)": judged,
        "reference: forward(2·P, n) + head(2·P·r)":
            trunk.forward(chosen, load.length) + trunk.head(chosen * load.new_tokens),
        "DPO: train(2·P, n, 2·P·r)": trunk.train(chosen, load.length, chosen * load.new_tokens),
    }


def constitutional(trunk: Trunk, load: Load) -> Terms:
    """Critiques and revisions to fine-tune on; a preference model of the trunk's size from AI labels; the same PPO."""
    firsts, told = load.responses / load.num_revisions, load.template_tokens + load.length
    return pretraining(trunk, load) | {
        "first answers: generate(R/4, R/4, p, r)":
            trunk.generate(firsts, firsts, load.prompt_tokens, load.new_tokens),
        "critiques and revisions, in one go: generate(R, R, t + n, v + r)":
            trunk.generate(load.responses, load.responses, told, load.verdict_tokens + load.new_tokens),
        "revised answers: train(R, n, R·r)": supervised(trunk, load),
        "answers to compare: generate(P, R, p, r)": sampling(trunk, load),
        "labels: forward(R/2, t + n + r) + head(R/2)":
            trunk.forward(load.responses / 2, told + load.new_tokens) + trunk.head(load.responses / 2),
        "preference model: 3·forward(R, n)": 3 * trunk.forward(load.responses, load.length),
    } | ppo(trunk, load)


def pretraining(trunk: Trunk, load: Load) -> Terms:
    tokens = load.corpus_rows * load.row_tokens
    return {"corpus: train(C, T, C·T)": trunk.train(load.corpus_rows, load.row_tokens, tokens)}


def sampling(trunk: Trunk, load: Load) -> float:
    return trunk.generate(load.prompts, load.responses, load.prompt_tokens, load.new_tokens)


def supervised(trunk: Trunk, load: Load) -> float:
    """One pass of the language model over every response."""
    return trunk.train(load.responses, load.length, load.responses * load.new_tokens)


ASA = "ASA-LLM"
METHODS: Mapping[str, Callable[[Trunk, Load], Terms]] = {
    ASA: asa, "RLHF": rlhf, "Self-Rewarding": self_rewarding, "Constitutional AI": constitutional}


def ratios_to_asa(trunk: Trunk, load: Load) -> dict[str, float]:
    """Operations of every other method's step, of ASA-LLM's."""
    totals = {name: sum(method(trunk, load).values()) for name, method in METHODS.items()}
    return {name: total / totals[ASA] for name, total in totals.items() if name != ASA}
