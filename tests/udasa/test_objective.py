"""The preference loss: against its equations in float64, added up over micro-batches, and against TRL's."""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import Tensor

from asa_dist.asa.objective import FusedOutput
from asa_dist.config_udasa import DpoConfig
from asa_dist.udasa.objective import PAIR_LOSSES, PairCounts, preference_loss

if TYPE_CHECKING:
    from transformers import LlamaForCausalLM
    from trl import DPOTrainer

CONFIGS = [
    DpoConfig(loss=loss, beta=0.3, label_smoothing=smoothing, length_normalized=normalized)
    for loss in ("sigmoid", "ipo", "hinge")
    for smoothing in (0.0, 0.2)
    for normalized in (False, True)
]


def pairs(dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """(log-probabilities with a graph, reference's, lengths) of seven pairs, easy and hopeless, one response empty."""
    rng = torch.Generator().manual_seed(0)
    length_P2 = torch.randint(1, 14, (7, 2), generator=rng)
    length_P2[4, 1] = 0
    reference_P2 = -2.0 * length_P2 * torch.rand(7, 2, generator=rng)
    ratio_P2 = torch.tensor([[3, -5], [-1, -1], [0.2, 0.1], [-9, 12], [2, 0], [-80, -84], [7, -7]])
    logprob_P2 = (reference_P2 + ratio_P2).to(dtype).requires_grad_()
    return logprob_P2, reference_P2.to(dtype), length_P2


def by_hand(
    logprob_P2: Tensor, reference_P2: Tensor, length_P2: Tensor, config: DpoConfig, kl_weight: float, counts: PairCounts
) -> tuple[dict[str, float], list[list[float]]]:
    """(sums, gradient of the loss by ``logprob_P2``), pair by pair, with derivatives worked out on paper."""
    beta, smoothing = config.beta, config.label_smoothing

    def loss_and_slope(h: float) -> tuple[float, float]:
        if config.loss == "sigmoid":
            return math.log1p(math.exp(-beta * h)), -beta / (1 + math.exp(beta * h))
        if config.loss == "hinge":
            return (1 - beta * h, -beta) if beta * h < 1 else (0.0, 0.0)
        return (h - 0.5 / beta) ** 2, 2 * (h - 0.5 / beta)

    sums = dict.fromkeys(("udasa/loss", "udasa/margin", "udasa/accuracy", "udasa/kl"), 0.0)
    gradient = []
    for logprobs, references, lengths in zip(
        logprob_P2.double().tolist(), reference_P2.double().tolist(), length_P2.tolist(), strict=True
    ):
        per_token = config.loss == "ipo" or config.length_normalized
        divisors = [max(length, 1) if per_token else 1 for length in lengths]
        ratios = [logprob - reference for logprob, reference in zip(logprobs, references, strict=True)]
        h = ratios[0] / divisors[0] - ratios[1] / divisors[1]
        (loss, slope), (flipped_loss, flipped_slope) = loss_and_slope(h), loss_and_slope(-h)
        sums["udasa/loss"] += ((1 - smoothing) * loss + smoothing * flipped_loss) / counts.pairs
        sums["udasa/loss"] -= kl_weight * sum(ratios) / counts.response_tokens
        sums["udasa/margin"] += beta * h
        sums["udasa/accuracy"] += h > 0
        sums["udasa/kl"] -= sum(ratios)
        by_h = ((1 - smoothing) * slope - smoothing * flipped_slope) / counts.pairs
        by_kl = kl_weight / counts.response_tokens
        gradient.append([by_h / divisors[0] - by_kl, -by_h / divisors[1] - by_kl])
    return sums, gradient


@pytest.mark.parametrize("kl_weight", [0.0, 0.05])
@pytest.mark.parametrize("config", CONFIGS, ids=str)
def test_loss_gradient_and_metrics_follow_the_equations(config: DpoConfig, kl_weight: float) -> None:
    counts = PairCounts(pairs=11.0, response_tokens=203.0)  # of the whole batch: more than these seven
    for dtype, tolerance in ((torch.float64, 1e-12), (torch.float32, 1e-5)):
        batch = pairs(dtype)
        sums, gradient = by_hand(*(tensor.detach() for tensor in batch), config, kl_weight, counts)
        found = preference_loss(*batch, config, kl_weight, counts)
        found.loss.backward()
        assert found.loss.dtype == dtype
        assert {name: float(value) for name, value in found.sums.items()} == pytest.approx(sums, rel=tolerance)
        torch.testing.assert_close(
            batch[0].grad, torch.tensor(gradient, dtype=dtype), rtol=tolerance, atol=tolerance * 1e-2
        )
        assert not any(value.requires_grad for value in (*found.sums.values(), *found.terms.values()))
        reward_P2 = found.terms["reward"]
        assert float((reward_P2[:, 0] - reward_P2[:, 1]).sum()) == pytest.approx(sums["udasa/margin"], rel=tolerance)


def test_at_the_reference_the_loss_is_known() -> None:
    """ln 2, 1, 1/(2β)²: what the first evaluation of a stage shows, whatever the responses."""
    _, reference_P2, length_P2 = pairs(torch.float64)
    expected = {"sigmoid": math.log(2), "hinge": 1.0, "ipo": 25.0}
    assert expected.keys() == PAIR_LOSSES.keys()
    for loss, value in expected.items():
        found = preference_loss(reference_P2, reference_P2, length_P2, DpoConfig(loss=loss), 0.5, PairCounts(7, 90))
        assert float(found.loss) == pytest.approx(value)
        for name in ("margin", "accuracy", "kl"):
            assert float(found.sums[f"udasa/{name}"]) == 0, "a tie is no win"


@pytest.mark.parametrize("config", CONFIGS, ids=str)
def test_micro_batches_add_up_to_the_whole(config: DpoConfig) -> None:
    logprob_P2, reference_P2, length_P2 = pairs(torch.float64)
    slices = [slice(0, 2), slice(2, 2), slice(2, 3), slice(3, 7)]  # one of them has no pairs

    def output(part: slice, counts: PairCounts) -> FusedOutput:
        return preference_loss(logprob_P2[part], reference_P2[part], length_P2[part], config, 0.05, counts)

    counts = PairCounts(*sum(PairCounts.of(length_P2[part]) for part in slices).tolist())
    assert counts == PairCounts(pairs=7, response_tokens=float(length_P2.sum()))
    whole, parts = output(slice(None), counts), [output(part, counts) for part in slices]
    for name, value in whole.sums.items():
        assert sum(float(part.sums[name]) for part in parts) == pytest.approx(float(value), rel=1e-12)
    expected = torch.autograd.grad(whole.loss, logprob_P2)[0]
    found = sum(torch.autograd.grad(part.loss, logprob_P2)[0] for part in parts)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=0)


def test_far_from_the_reference_nothing_overflows() -> None:
    logprob_P2 = torch.tensor([[-3e4, 0.0], [0.0, -3e4]], requires_grad=True)
    found = preference_loss(
        logprob_P2, torch.zeros(2, 2), torch.full((2, 2), 9), DpoConfig(beta=1.0), 0.0, PairCounts(2, 36)
    )
    found.loss.backward()
    assert float(found.sums["udasa/loss"]) == pytest.approx(1.5e4)
    assert logprob_P2.grad.flatten().tolist() == pytest.approx([-0.5, 0.5, 0, 0])


# --- TRL's, through its own trainer and models ------------------------------------------------------------------
VOCAB, EOS, PAD, BETA = 47, 0, 1, 0.5


def tiny_llama(seed: int) -> LlamaForCausalLM:
    """Large weights, so that no token's distribution is near uniform."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCAB, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
            num_key_value_heads=2, max_position_embeddings=32, initializer_range=0.2,
            eos_token_id=EOS, pad_token_id=PAD,
        )
    )


def trl_trainer(model: LlamaForCausalLM, folder: Path, **options: Any) -> DPOTrainer:
    """TRL's DPO over ``model``, with another one as its reference."""
    from datasets import Dataset
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast
    from trl import DPOConfig, DPOTrainer

    words = {"<eos>": EOS, "<pad>": PAD} | {f"w{token}": token for token in range(2, VOCAB)}
    word_level = Tokenizer(models.WordLevel(words, unk_token="<pad>"))
    return DPOTrainer(
        model,
        ref_model=tiny_llama(seed=1),
        args=DPOConfig(
            str(folder), beta=BETA, use_cpu=True, bf16=False, gradient_checkpointing=False, report_to=[], **options
        ),
        train_dataset=Dataset.from_list([{"prompt": "w2", "chosen": "w3", "rejected": "w4"}]),
        processing_class=PreTrainedTokenizerFast(tokenizer_object=word_level, eos_token="<eos>", pad_token="<pad>"),
    )


def preference_examples(num_pairs: int) -> list[dict[str, list[int]]]:
    """Token ids of random prompts and responses of unequal lengths, end-of-text included."""
    rng = torch.Generator().manual_seed(2)

    def tokens(longest: int) -> list[int]:
        length = int(torch.randint(1, longest + 1, (), generator=rng))
        return torch.randint(2, VOCAB, (length,), generator=rng).tolist()

    return [
        {"prompt_ids": tokens(4), "chosen_ids": [*tokens(7), EOS], "rejected_ids": [*tokens(7), EOS]}
        for _ in range(num_pairs)
    ]


def response_logprobs(model: LlamaForCausalLM, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """(log-probabilities summed over each response [P, 2], tokens of each response [P, 2])."""
    logits_ST = model(batch["input_ids"], attention_mask=batch["attention_mask"]).logits[:, :-1].log_softmax(-1)
    mask_ST = batch["completion_mask"][:, 1:]
    logprob_S = (logits_ST.gather(-1, batch["input_ids"][:, 1:, None]).squeeze(-1) * mask_ST).sum(1)
    return torch.stack(logprob_S.chunk(2), 1), torch.stack(mask_ST.sum(1).chunk(2), 1)


@pytest.mark.parametrize(
    ("config", "trl_loss", "pairs_per_batch"),
    [
        (DpoConfig(loss="sigmoid", beta=BETA), "sigmoid", 5),
        (DpoConfig(loss="ipo", beta=BETA), "ipo", 5),
        (DpoConfig(loss="hinge", beta=BETA), "hinge", 5),
        (DpoConfig(loss="sigmoid", beta=BETA, length_normalized=True), "sigmoid_norm", 5),
        # TRL smooths labels in this way in aot alone, which is sigmoid where there is one pair, and so nothing to sort
        (DpoConfig(loss="sigmoid", beta=BETA, label_smoothing=0.2), "aot", 1),
    ],
    ids=["sigmoid", "ipo", "hinge", "length_normalized", "label_smoothing"],
)
def test_equals_trl(config: DpoConfig, trl_loss: str, pairs_per_batch: int, tmp_path: Path) -> None:
    """The loss, and the gradient of every weight of a model, in float32; the same reference."""
    model, num_batches = tiny_llama(seed=0), 5 // pairs_per_batch
    trainer = trl_trainer(copy.deepcopy(model), tmp_path, loss_type=[trl_loss], label_smoothing=config.label_smoothing)
    examples = preference_examples(5)
    own, theirs = torch.zeros(()), torch.zeros(())
    for start in range(0, 5, pairs_per_batch):
        batch = trainer.data_collator(examples[start : start + pairs_per_batch])
        reference_P2 = torch.stack(trainer.compute_ref_log_probs(trainer.ref_model, batch), 1)
        logprob_P2, length_P2 = response_logprobs(model, batch)
        own = own + preference_loss(logprob_P2, reference_P2, length_P2, config, 0.0, PairCounts(5, 1)).loss
        theirs = theirs + trainer.compute_loss(trainer.model, batch) / num_batches
    torch.testing.assert_close(own, theirs, rtol=1e-5, atol=1e-5)
    own.backward()
    theirs.backward()
    for (name, weight), trl_weight in zip(model.named_parameters(), trainer.model.parameters(), strict=True):
        assert trl_weight.grad.abs().max() > 1e-3, f"{name} has no gradient to compare"
        torch.testing.assert_close(weight.grad, trl_weight.grad, rtol=1e-5, atol=1e-5)
