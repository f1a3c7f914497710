"""What a config alone says: the trunk's sizes, parameters by part, and one step's work per rank and per worker."""

from __future__ import annotations

from dataclasses import dataclass

from asa_dist.config import ArchitectureConfig, Config, ConfigError

BYTES_OF = {"float32": 4, "bfloat16": 2}
META_PARAMETERS = 3 * 5 + 3  # ξ: asa/heads.py, MetaOptimizer


@dataclass(frozen=True)
class Trunk:
    """A Llama-style decoder.

    Attributes:
        query_size, key_size: widths of all query and of all key heads.
    """

    num_layers: int
    hidden_size: int
    intermediate_size: int
    query_size: int
    key_size: int
    vocab_size: int
    is_tied: bool

    @property
    def block_weights(self) -> int:
        """Matrices of all layers, as every token is multiplied by them."""
        attention = 2 * self.hidden_size * (self.query_size + self.key_size)
        return self.num_layers * (attention + 3 * self.hidden_size * self.intermediate_size)

    @property
    def embedding_weights(self) -> int:
        return self.vocab_size * self.hidden_size

    @property
    def num_parameters(self) -> int:
        """Of ψ; tied weights once."""
        norms = (2 * self.num_layers + 1) * self.hidden_size
        return self.block_weights + norms + (1 if self.is_tied else 2) * self.embedding_weights


def trunk_of(config: Config) -> Trunk:
    """
    Raises:
        ConfigError: the sizes are not in the config itself.
    """
    model, tokenizer = config.model, config.data.tokenizer
    if model.name_or_path is not None or tokenizer.train is None:
        raise ConfigError(
            f"model.name_or_path = {model.name_or_path!r}, data.tokenizer.path = {tokenizer.path!r}: a plan is "
            "made from the config alone. Write the model's sizes into model.architecture, with model.name_or_path=null "
            "data.tokenizer.path=null data.tokenizer.train.vocab_size=N"
        )
    return trunk_of_shape(model.architecture, tokenizer.train.vocab_size)


def trunk_of_shape(shape: ArchitectureConfig, vocab_size: int) -> Trunk:
    head_size = shape.hidden_size // shape.num_attention_heads
    return Trunk(
        shape.num_layers, shape.hidden_size, shape.intermediate_size, shape.num_attention_heads * head_size,
        shape.num_key_value_heads * head_size, vocab_size, shape.tie_word_embeddings)  # fmt: skip


def count_parameters(config: Config) -> dict[str, int]:
    """Of ψ, φ and ξ, as ``launcher.count_model`` counts them on a model that it builds."""
    trunk, evaluator = trunk_of(config), config.evaluator
    hidden, principles = trunk.hidden_size, len(evaluator.principles)
    is_learned = evaluator.embedding == "learned"
    size = evaluator.embedding_size if is_learned else hidden
    heads = (size * hidden if is_learned else 0) + 2 * size + 1 + hidden + 1 + principles * (size + 2)
    return {"psi": trunk.num_parameters, "phi": heads, "xi": META_PARAMETERS}


@dataclass(frozen=True)
class Work:
    """One step, every response as long as it may get: an upper bound.

    Attributes:
        corpus_rows, rollout_rows: of a rank's micro-batch, which hold ``row_tokens`` each.
        scored_tokens: of that micro-batch, that the output projection sees.
        answers_per_worker: responses that a worker generates for one step.
        leases_per_worker: after each other: engine vllm has all that a step needs at a time, engine hf one.
    """

    num_ranks: int
    num_workers: int
    micro_batches: int
    corpus_rows: int
    rollout_rows: int
    row_tokens: int
    scored_tokens: int
    prompts_per_worker: float
    answers_per_worker: float
    leases_per_worker: float
    prompt_tokens: int
    new_tokens: int

    @property
    def tokens(self) -> int:
        """Positions of a rank's micro-batch, padding included."""
        return (self.corpus_rows + self.rollout_rows) * self.row_tokens

    @property
    def answers_at_a_time(self) -> float:
        """That a worker decodes together."""
        return self.answers_per_worker / self.leases_per_worker

    @property
    def scored_tokens_per_step(self) -> int:
        """Corpus and response tokens, all ranks."""
        return self.scored_tokens * self.micro_batches * self.num_ranks


def work_of(config: Config) -> Work:
    """Of a config whose numbers of ranks and workers are final."""
    rollout, train, row_tokens = config.rollout, config.train, config.data.sequence_length
    num_batches = config.num_ranks * train.accumulation_steps
    corpus_rows = train.corpus_rows_per_step // num_batches
    answers = rollout.prompts_per_step // num_batches * rollout.responses_per_prompt
    prompts_per_worker = rollout.prompts_per_step / rollout.workers
    of_lease = rollout.groups_per_lease or prompts_per_worker
    groups_at_a_time = prompts_per_worker if rollout.engine == "vllm" else of_lease
    per_row = row_tokens // (rollout.max_prompt_tokens + rollout.max_new_tokens)
    return Work(
        num_ranks=config.num_ranks,
        num_workers=rollout.workers,
        micro_batches=train.accumulation_steps,
        corpus_rows=corpus_rows,
        rollout_rows=-(-answers // per_row),
        row_tokens=row_tokens,
        scored_tokens=corpus_rows * row_tokens + answers * rollout.max_new_tokens,
        prompts_per_worker=prompts_per_worker,
        answers_per_worker=prompts_per_worker * rollout.responses_per_prompt,
        leases_per_worker=max(1.0, prompts_per_worker / groups_at_a_time),
        prompt_tokens=rollout.max_prompt_tokens,
        new_tokens=rollout.max_new_tokens,
    )
