"""What a rehearsal trains: the real loop and its engine, handed made-up tokens instead of a corpus and workers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from asa_dist.config import Config
from asa_dist.plan.shape import trunk_of, work_of

if TYPE_CHECKING:
    from torch import Tensor

    from asa_dist.asa.loop import AsaLoop
    from asa_dist.asa.packing import MicroBatch, TextTables
    from asa_dist.records import RolloutGroup
    from asa_dist.runtime.engine import Placement, TrainEngine

SEED, EOS = 0, 0
CLAIM_TOKENS, SENTENCE_TOKENS = 8, 16  # one token in so many ends one


def made_up_loop(config: Config, placement: Placement, record: Callable[[dict[str, float]], object]
                 ) -> tuple[AsaLoop, TrainEngine]:
    """The real loop and its engine; corpus and rollouts are made up, learning rates are 0."""
    from asa_dist.asa.loop import AsaLoop
    from asa_dist.asa.trust import AlignmentState
    from asa_dist.runtime.engine import PARTS, TrainEngine
    from asa_dist.runtime.model import build_model

    vocab_size = trunk_of(config).vocab_size
    model = build_model(config, vocab_size, EOS, on_cuda=False)
    tokens = MadeUpTokens(config, placement)
    engine = TrainEngine(model, config.train, config.optimizer, config.model.dtype, placement)
    loop = AsaLoop(
        config=config, rank=placement.rank, num_ranks=placement.num_ranks, device=placement.device,
        tables=tokens.tables(), state=AlignmentState(config.evaluator, model.lm.config.hidden_size, vocab_size),
        engine=engine, corpus=tokens, rollouts=tokens, rollout_engine="hf", recorder=KeptMetrics(record),
        checkpoints=NoCheckpoints(), learning_rates=lambda step: dict.fromkeys(PARTS, 0.0),
        stop_code=lambda: 0)  # fmt: skip
    return loop, engine


def random_tokens(rng: Any, vocab_size: int, count: int) -> Any:
    return rng.integers(1, vocab_size, count).astype("int32")


class MadeUpTokens:
    """Corpus and rollouts of a rank: as much as the config allows, of random tokens."""

    def __init__(self, config: Config, placement: Placement) -> None:
        import numpy as np

        self._config, self._rank = config, placement.rank
        self._vocab_size, self._work = trunk_of(config).vocab_size, work_of(config)
        self._rng = np.random.default_rng([SEED, placement.rank])
        self._batch = self._corpus_batch()

    def tables(self) -> TextTables:
        import numpy as np

        from asa_dist.asa.packing import TextTables

        token_V = np.arange(self._vocab_size)
        return TextTables(token_V % CLAIM_TOKENS == 1, token_V % SENTENCE_TOKENS == 1, token_V == EOS)

    def _corpus_batch(self) -> MicroBatch:
        import torch

        from asa_dist.asa.packing import IGNORED, corpus_batch

        shape = self._work.corpus_rows, self._work.row_tokens
        ids_RT = torch.from_numpy(self._rng.integers(1, self._vocab_size, shape))
        target_RT = ids_RT.roll(-1, 1)
        target_RT[:, -1] = IGNORED
        position_RT = torch.arange(self._work.row_tokens).expand(shape).contiguous()
        return corpus_batch(ids_RT, position_RT, torch.zeros_like(ids_RT), target_RT)

    # corpus
    def train_batches(self, step: int) -> list[MicroBatch]:
        return [self._batch] * self._work.micro_batches

    def trained(self) -> None: ...

    def heldout_batches(self) -> list[MicroBatch]:
        return [self._batch]

    def bigram_perplexity(self) -> float:
        return float(self._vocab_size)

    def state_dict(self) -> dict[str, Tensor]:
        return {}

    def load_state_dict(self, state: dict[str, Tensor]) -> None: ...

    # rollouts
    def request(self, step: int) -> None: ...

    def publish(self, version: int) -> None: ...

    def fall_back(self, reason: str) -> None: ...

    def take(self, step: int) -> list[RolloutGroup]:
        num_groups = self._config.rollout.prompts_per_step // self._work.num_ranks
        return [self._group(step, self._rank * num_groups + number) for number in range(num_groups)]

    def _group(self, step: int, index: int) -> RolloutGroup:
        import numpy as np

        from asa_dist.records import Prompt, Response, RolloutGroup

        prompt = Prompt(index, 0, random_tokens(self._rng, self._vocab_size, self._work.prompt_tokens))
        logprob_T = np.full(self._work.new_tokens, -np.log(self._vocab_size), np.float32)
        texts = [random_tokens(self._rng, self._vocab_size, self._work.new_tokens)
                 for _ in range(self._config.rollout.responses_per_prompt)]  # fmt: skip
        responses = tuple(Response(text, logprob_T, logprob_T, False, ((0, step),)) for text in texts)
        return RolloutGroup(step, index, prompt, responses)


class KeptMetrics:
    """What the loop tells, of which only metrics are of use here."""

    def __init__(self, record: Callable[[dict[str, float]], object]) -> None:
        self._record = record

    def metrics(self, values: dict[str, float]) -> None:
        self._record(values)

    def trained(self, step: int, prompt_ids: list[int], skipped: bool) -> None: ...

    def skipped(self, step: int, reason: str, prompt_ids: list[int]) -> None:
        raise RuntimeError(f"step {step} of the rehearsal was skipped: {reason}")

    def say(self, message: str) -> None: ...

    def event(self, name: str, /, **details: Any) -> None: ...

    def samples(
        self, step: int, groups: Sequence[RolloutGroup], terms: Sequence[dict[str, Tensor]], tau: float
    ) -> None: ...


class NoCheckpoints:
    def is_due(self, step: int) -> bool:
        return False

    def save(self, step: int, state: dict[str, Tensor]) -> bool:
        return True
