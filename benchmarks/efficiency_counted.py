"""The formulas of `efficiency_flops.py` and `step.py` beside what torch counts on small models.

Counted are operations that really run: a `transformers` Llama, our `hf` engine, and our fused step, heads included; and
all passes of a rank in `step.py`, on its model. The sequences fill their rows, so that nothing is padding; attention is
taken apart, as torch counts no fused one on a CPU.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from efficiency_flops import Load, Trunk, asa
from step import passes
from step_case import EOS, FUSED, PLAIN, UNFUSED, WHOLE, Case
from step_variants import LanguageModel, PassInputs, RewardModel, corpus_rows, fused_inputs, rollout_rows
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from asa_dist.asa.heads import NUM_FEATURES
from asa_dist.asa.objective import GlobalCounts, StepCoefficients, StepInputs
from asa_dist.asa.packing import MicroBatch, TextTables, corpus_batch, join, pack_groups
from asa_dist.config import Config, build_config
from asa_dist.records import Prompt, Response, RolloutGroup
from asa_dist.rollout.engine import SamplingConfig
from asa_dist.rollout.hf_engine import HfEngine
from asa_dist.runtime.model import AsaModel, build_model
from asa_dist.runtime.trunk import build_trunk

SEED, VOCAB = 5, 512
PROMPTS, GROUP_SIZE, PROMPT_TOKENS, NEW_TOKENS, CORPUS_ROWS = 4, 4, 24, 40, 12
LENGTH = PROMPT_TOKENS + NEW_TOKENS
SHAPES: dict[str, dict[str, Any]] = {
    "4 layers × 128": {"num_layers": 4, "hidden_size": 128, "intermediate_size": 352, "num_attention_heads": 4,
                       "num_key_value_heads": 4, "tie_word_embeddings": False},
    "2 layers × 192, grouped queries": {"num_layers": 2, "hidden_size": 192, "intermediate_size": 768,
                                        "num_attention_heads": 6, "num_key_value_heads": 2},
}


def config_of(shape: dict[str, Any]) -> Config:
    return build_config({
        "model": {"architecture": {**shape, "max_position_embeddings": LENGTH}},
        "data": {"sequence_length": LENGTH, "tokenizer": {"train": {"vocab_size": VOCAB}}},
        "rollout": {"prompts_per_step": PROMPTS, "responses_per_prompt": GROUP_SIZE, "min_prompt_tokens": PROMPT_TOKENS,
                    "max_prompt_tokens": PROMPT_TOKENS, "max_new_tokens": NEW_TOKENS},
        "train": {"corpus_rows_per_step": CORPUS_ROWS},
    }, "counted")  # fmt: skip


def counted(work: Callable[[], object]) -> int:
    """Operations of the matrix products that ``work`` runs, those into existing tensors and by oneDNN too."""
    uncounted = {torch.ops.aten.addmm_: _product_flops, torch.ops.aten.baddbmm_: _product_flops,
                 torch.ops.mkldnn._linear_pointwise: _linear_flops}
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False, custom_mapping=uncounted) as counter:
        work()
    return counter.get_total_flops()


def _product_flops(self_shape: Sequence[int], left: Sequence[int], right: Sequence[int], **options: object) -> int:
    return 2 * int(np.prod(left)) * right[-1]


def _linear_flops(left: Sequence[int], right: Sequence[int], *rest: object, **options: object) -> int:
    return 2 * int(np.prod(left)) * right[0]


def count_shape(shape: dict[str, Any]) -> dict[str, tuple[int, float]]:
    """(counted, by formula) of each kind of work in `efficiency_flops.py`."""
    config = config_of(shape)
    trunk, load = Trunk.of(config, VOCAB), Load.of(config)
    model = build_model(config, VOCAB, VOCAB - 1, on_cuda=False)
    random = np.random.default_rng(SEED)
    token_RN = torch.from_numpy(random.integers(0, VOCAB, (CORPUS_ROWS, LENGTH)))
    plain = plain_model(model)
    logits = trunk.head(token_RN.numel())
    return {
        "forward": (counted(lambda: without_gradient(plain, token_RN)), trunk.forward(CORPUS_ROWS, LENGTH) + logits),
        "forward and backward": (counted(lambda: plain(token_RN, labels=token_RN).loss.backward()),
                                 trunk.train(CORPUS_ROWS, LENGTH, token_RN.numel(), head_passes=3)),
        "generation": (counted(lambda: generate(plain, config, random)),
                       trunk.generate(PROMPTS, PROMPTS * GROUP_SIZE, PROMPT_TOKENS, NEW_TOKENS)),
        "fused step": (counted(lambda: fused_step(model, token_RN, random)),
                       sum(flops for term, flops in asa(trunk, load).items() if not term.startswith("answers"))),
    }


def plain_model(model: AsaModel) -> Any:
    """The trunk as transformers has it, with its own output projection."""
    from transformers import AutoModelForCausalLM

    torch.manual_seed(SEED)
    return AutoModelForCausalLM.from_config(model.lm.config, attn_implementation="sdpa", dtype=torch.float32)


@torch.no_grad()
def without_gradient(plain: Any, token_RN: Tensor) -> None:
    plain(token_RN, use_cache=False)


def generate(plain: Any, config: Config, random: np.random.Generator) -> None:
    """By our engine; no end-of-text ever comes."""
    with tempfile.TemporaryDirectory(prefix="asa-efficiency-") as folder:
        plain.config.save_pretrained(folder)
        engine = HfEngine(folder, config.model, SamplingConfig(config.rollout, SEED, eos_token_id=VOCAB), "cpu")
    engine.load(0, plain.named_parameters())
    engine.generate([Prompt(number, 0, random.integers(0, VOCAB, PROMPT_TOKENS).astype(np.int32))
                     for number in range(PROMPTS)])


def fused_step(model: AsaModel, token_RN: Tensor, random: np.random.Generator) -> None:
    target_RN = token_RN.roll(-1, 1)
    position_RN = torch.arange(LENGTH).expand(CORPUS_ROWS, LENGTH).contiguous()
    corpus = corpus_batch(token_RN, position_RN, torch.zeros_like(token_RN), target_RN)
    batch = join(corpus, rollouts(random))
    counts = GlobalCounts(*GlobalCounts.of(batch).tolist())
    inputs = StepInputs(StepCoefficients(0.5, 0.4, 0.1, 0.5), counts, torch.zeros(model.lm.config.hidden_size), 1.0,
                        torch.zeros(NUM_FEATURES), torch.ones(VOCAB))
    model(batch=batch, inputs=inputs).loss.backward()


def rollouts(random: np.random.Generator) -> MicroBatch:
    """One response per row, each of several claims."""
    is_end_V = np.arange(VOCAB) % 16 == 0
    tables = TextTables(claim_end_V=is_end_V, sentence_end_V=is_end_V, blank_V=np.zeros(VOCAB, dtype=bool))
    groups = [
        RolloutGroup(0, index, Prompt(index, 0, random.integers(0, VOCAB, PROMPT_TOKENS).astype(np.int32)),
                     tuple(response(random) for _ in range(GROUP_SIZE)))
        for index in range(PROMPTS)
    ]  # fmt: skip
    return pack_groups(groups, LENGTH, tables, version=0)


def response(random: np.random.Generator) -> Response:
    logprob_T = -random.exponential(2.0, NEW_TOKENS).astype(np.float32)
    token_ids = random.integers(0, VOCAB, NEW_TOKENS).astype(np.int32)
    return Response(token_ids, logprob_T, logprob_T, finished=False, spans=((0, 0),))


def count_step(case: Case) -> dict[str, tuple[int, float]]:
    """(counted, by formula) of each variant of `step.py`, all passes of a rank."""
    random = np.random.default_rng(SEED)
    corpus, responses = corpus_rows(case, random), rollout_rows(case, random)
    both = join(corpus, responses)
    counts = GlobalCounts(*GlobalCounts.of(both).tolist())
    advantage_PG = torch.ones(case.rollout_rows, responses.responses.group_size)

    def language_model(has_whole_logits: bool = False) -> LanguageModel:
        trunk = build_trunk(case.config.model, SEED, case.vocab_size, EOS, case.row_tokens, on_cuda=False)
        return LanguageModel(trunk, case.config.model.logprob_chunk_tokens, has_whole_logits)

    fused = build_model(case.config, case.vocab_size, EOS, on_cuda=False)
    plain, whole, policy = language_model(), language_model(has_whole_logits=True), language_model()
    reward = RewardModel(language_model().lm, case.config.model.logprob_chunk_tokens)
    inputs, weighted = PassInputs(counts), PassInputs(counts, advantage_PG)

    def unfused() -> None:
        policy(corpus, inputs).loss.backward()
        policy(responses, weighted).loss.backward()
        with torch.no_grad():
            reward(responses)
            policy(responses, None)

    work: dict[str, Callable[[], object]] = {
        FUSED: lambda: fused(batch=both, inputs=fused_inputs(case, counts)).loss.backward(),
        PLAIN: lambda: plain(both, inputs).loss.backward(),
        WHOLE: lambda: whole(both, inputs).loss.backward(),
        UNFUSED: unfused,
    }
    formulas = passes(case)
    return {variant: (counted(work[variant]), sum(formulas[variant].values())) for variant in work}
