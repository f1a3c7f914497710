"""The counter-based sampler: right distribution, independence, and nothing that depends on the batch."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import Tensor

from asa_dist.rollout import sampling
from asa_dist.rollout.sampling import choose_tokens, exponential_noise, sampling_keys, truncate


def keys(seed: int, epoch: int, prompt_id: int, sibling: Tensor | int) -> Tensor:
    rows = torch.as_tensor(sibling).reshape(-1)
    return sampling_keys(seed, torch.full_like(rows, epoch), torch.full_like(rows, prompt_id), rows)


def noise(seed: int, epoch: int, prompt_id: int, sibling: Tensor | int, position: int, vocab_size: int) -> Tensor:
    return exponential_noise(keys(seed, epoch, prompt_id, sibling), torch.tensor(position), vocab_size)


def uniform(exponential: Tensor) -> Tensor:
    return torch.exp(-exponential.double())


def chi_square_z(counts: Tensor, probabilities: Tensor) -> float:
    """(χ² − degrees of freedom) / its standard deviation: about N(0, 1) if the counts follow the probabilities."""
    expected = probabilities.double() * counts.sum()
    freedom = len(counts) - 1
    return float((((counts - expected) ** 2 / expected).sum() - freedom) / (2 * freedom) ** 0.5)


def test_mixing_is_splitmix64() -> None:
    """Java's SplittableRandom(0) starts with these outputs; computed here with Python's integers as well."""
    state = torch.tensor([1, 2, 3], dtype=torch.int64) * sampling._GOLDEN
    found = [value % 2**64 for value in sampling._mix(state).tolist()]
    assert found == [0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4, 0x06C45D188009454F]


def test_choices_follow_softmax() -> None:
    logits_V = torch.randn(11, generator=torch.Generator().manual_seed(0)) * 1.5
    siblings = torch.arange(60_000)
    token_B, logprob_B, behaviour_B = choose_tokens(
        logits_V.expand(len(siblings), -1), keys(7, 0, 3, siblings), torch.tensor(0), temperature=0.8)
    assert abs(chi_square_z(token_B.bincount(minlength=11), (logits_V / 0.8).softmax(0))) < 4
    assert torch.allclose(logprob_B, logits_V.log_softmax(0)[token_B], atol=1e-6)
    assert torch.allclose(behaviour_B, (logits_V / 0.8).log_softmax(0)[token_B], atol=1e-6)


@pytest.mark.parametrize("field", ["seed", "epoch", "prompt_id", "sibling", "position", "token"])
def test_noise_is_uniform_and_independent_along_every_field(field: str) -> None:
    values = range(3000)
    if field == "token":
        series = uniform(noise(5, 1, 2, 3, 4, 3000))[0]
    elif field == "sibling":
        series = uniform(noise(5, 1, 2, torch.arange(3000), 4, 1))[:, 0]
    else:
        base = {"seed": 5, "epoch": 1, "prompt_id": 2, "sibling": 3, "position": 4, "vocab_size": 1}
        series = torch.cat([uniform(noise(**{**base, field: value}))[:, 0] for value in values])
    assert abs(chi_square_z(torch.histc(series.float(), 20, 0, 1).double(), torch.full((20,), 0.05))) < 4
    for lag in (1, 2, 8):  # serial correlation, in standard deviations
        a, b = series[:-lag] - 0.5, series[lag:] - 0.5
        assert abs(float((a * b).mean() * 12 * len(a) ** 0.5)) < 4, lag


def test_fields_are_not_interchangeable() -> None:
    """Same numbers in other fields, equal seeds and epochs included, give other noise."""
    seen = {noise(*fields, 1).item() for fields in itertools.product(range(4), repeat=5)}
    assert len(seen) > 4**5 - 3  # float32 may coincide by chance, keys do not


def test_positions_and_tokens_do_not_share_noise() -> None:
    """A stream of one position must not continue in that of the next, shifted by a token."""
    grid = torch.cat([noise(5, 1, 2, 3, position, 64) for position in range(64)])
    assert grid.unique().numel() > 64 * 64 - 10


def test_noise_is_always_positive_and_finite() -> None:
    found = noise(0, 0, 0, torch.arange(1000), 0, 5000)
    assert found.isfinite().all() and found.min() > 0


def test_noise_is_positive_and_finite_for_extreme_words() -> None:
    """And ascending in u: the first word counts, but for its sign; the second one only where that one is small."""
    bits_V = torch.tensor([0, 0, 0, 1, 2**23, 2**30, 2**31 - 1], dtype=torch.int32)
    fraction_V = torch.tensor([-(2**31), 0, 2**31 - 1, -(2**31), 0, 0, 2**31 - 1], dtype=torch.int32)
    noise_BV = sampling._exponential(torch.stack([bits_V, bits_V - 2**31]), fraction_V.expand(2, -1))
    assert torch.equal(noise_BV[0], noise_BV[1])
    assert noise_BV.max() < 17 and noise_BV.min() >= 2**-55
    assert (noise_BV.diff() >= 0).all()
    assert noise_BV[0, 1] == pytest.approx(2**-32, rel=1e-6)  # u = 2⁻³²
    assert noise_BV[0, 5] == pytest.approx(math.log(2), rel=1e-6)  # u = 1/2


def test_the_tail_is_finer_than_31_bits() -> None:
    """Among so many tokens some have u < 2⁻²², and no two of them the same."""
    noise_V = noise(5, 1, 2, torch.arange(200), 4, 200_000).flatten()
    smallest = noise_V[noise_V < 2**-22]
    assert 2 < len(smallest) < 30  # 9.5 expected
    assert smallest.unique().numel() == len(smallest)


@pytest.mark.parametrize("rows_at_once", [0, 5, 17])
@pytest.mark.parametrize("spread", [0.01, 1.0, 8.0, 60.0])
def test_the_race_is_gumbel_max(monkeypatch: pytest.MonkeyPatch, rows_at_once: int, spread: float) -> None:
    """By definition, in float64, from the same noise; likely tokens and those that float32's exp makes 0."""
    monkeypatch.setattr(sampling, "_CACHED_ELEMENTS", rows_at_once * 301)
    logits_BV = torch.randn(17, 301, generator=torch.Generator().manual_seed(4)) * spread
    key_B, position_B = keys(9, 0, 5, torch.arange(17)), torch.arange(17) * 3
    expected_BV = logits_BV.double() / 0.9 - exponential_noise(key_B, position_B, 301).double().log()
    token_B, logprob_B, behaviour_B = choose_tokens(logits_BV, key_B, position_B, temperature=0.9)
    assert torch.equal(token_B, expected_BV.argmax(-1))
    rows = torch.arange(17)
    for found_B, tempered_BV in ((logprob_B, logits_BV.double()), (behaviour_B, logits_BV.double() / 0.9)):
        assert torch.allclose(found_B.double(), tempered_BV.log_softmax(-1)[rows, token_B], rtol=1e-5, atol=1e-5)


def test_a_token_far_below_float32_resolution_can_win() -> None:
    """Its odds are 2⁻³⁰, and its noise the smallest there is, wherever it stands."""
    noise_BV = sampling._exponential(torch.tensor([[2**30, 0]], dtype=torch.int32),
                                     torch.tensor([[0, -(2**31)]], dtype=torch.int32))
    odds_BV, _ = sampling._odds(torch.tensor([[0.0, -30 * math.log(2)]]))
    assert sampling._argmin(noise_BV / odds_BV).item() == 1


def test_mixing_32_bits_is_lowbias32() -> None:
    """Computed with Python's integers as well."""
    def slow(value: int) -> int:
        for count, multiplier in ((16, 0x21F0AAAD), (15, 0xD35A2D97)):
            value = (value ^ value >> count) * multiplier % 2**32
        return value ^ value >> 15

    values = [0, 1, 2, 2**31 - 1, 2**31, 2**32 - 1, 0x9E3779B9]
    signed = torch.tensor(values, dtype=torch.int64).to(torch.int32)
    assert [found % 2**32 for found in sampling._mix_32(signed).tolist()] == [slow(value) for value in values]


def test_a_row_alone_equals_the_row_in_a_batch() -> None:
    logits_BV = torch.randn(17, 301, generator=torch.Generator().manual_seed(1))
    key_B = sampling_keys(9, torch.zeros(17, dtype=torch.int64), torch.arange(17) // 4, torch.arange(17) % 4)
    position_B = torch.arange(17) * 3
    together = choose_tokens(logits_BV, key_B, position_B, temperature=1.3, top_p=0.9, top_k=50)
    for row in range(17):
        one = slice(row, row + 1)
        alone = choose_tokens(logits_BV[one], key_B[one], position_B[one], temperature=1.3, top_p=0.9, top_k=50)
        assert alone[0] == together[0][row]
        assert torch.allclose(torch.stack(alone[1:]), torch.stack(together[1:])[:, one], atol=1e-6)


def slow_truncate(logits: list[float], top_p: float, top_k: int, min_p: float) -> set[int]:
    """The tokens that stay, by definition, in float64."""
    def probabilities(tokens: list[int]) -> dict[int, float]:
        weights = {token: torch.tensor(logits[token]).double().exp().item() for token in tokens}
        return {token: weight / sum(weights.values()) for token, weight in weights.items()}

    kept = sorted(range(len(logits)), key=lambda token: (-logits[token], token))
    if top_k:
        kept = kept[:top_k]
    if top_p < 1:
        p, mass, nucleus = probabilities(kept), 0.0, []
        for token in kept:
            if nucleus and mass >= top_p:
                break
            nucleus.append(token)
            mass += p[token]
        kept = nucleus
    p = probabilities(kept)
    return {token for token in kept if p[token] >= min_p * max(p.values())}


@pytest.mark.parametrize(("top_p", "top_k", "min_p"), [
    (1.0, 0, 0.0), (1.0, 1, 0.0), (1.0, 5, 0.0), (1.0, 99, 0.0), (0.01, 0, 0.0), (0.6, 0, 0.0), (0.95, 0, 0.0),
    (1.0, 0, 0.1), (1.0, 0, 0.7), (0.8, 6, 0.0), (0.9, 12, 0.05)])
def test_truncation_equals_a_slow_reference(top_p: float, top_k: int, min_p: float) -> None:
    logits_BV = torch.randn(23, 37, generator=torch.Generator().manual_seed(2)) * 2
    logits_BV[0, 5:9] = logits_BV[0].max() + 1  # ties at the top
    before = logits_BV.clone()
    kept_BV = truncate(logits_BV, top_p, top_k, min_p)
    assert torch.equal(logits_BV, before)
    for row in range(23):
        kept = set(kept_BV[row].isfinite().nonzero()[:, 0].tolist())
        assert kept == slow_truncate(logits_BV[row].tolist(), top_p, top_k, min_p)
        assert torch.equal(kept_BV[row, sorted(kept)], logits_BV[row, sorted(kept)])


def test_behaviour_logprob_is_not_truncated() -> None:
    logits_BV = torch.tensor([3.0, 1.0, 0.0]).expand(64, -1)
    token_B, logprob_B, behaviour_B = choose_tokens(
        logits_BV, keys(1, 0, 0, torch.arange(64)), torch.tensor(0), temperature=2.0, top_k=1)
    assert (token_B == 0).all()
    assert torch.allclose(logprob_B, logits_BV.log_softmax(-1)[:, 0])
    assert torch.allclose(behaviour_B, (logits_BV / 2).log_softmax(-1)[:, 0])
