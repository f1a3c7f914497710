"""The counter-based sampler: noise is a function of *which* token is drawn, never of who draws it or when.

A race: argmin_v(e_v / p_v) with independent e_v ~ Exponential(1) is a draw from p. (It is the Gumbel-max draw
argmax_v(log p_v + g_v) with g = −log e, and one logarithm less.) Every e is computed from (run seed, epoch, prompt id,
sibling, position, token id) by integer mixing, so there is no generator state to hold, ship or restore, and a row draws
the same noise alone, in any batch, and on any device.

Shapes: B rows, V vocabulary.
"""

from __future__ import annotations

import functools
import math

import numpy as np
import torch
from torch import Tensor

# splitmix64 (Steele, Lea, Flood 2014), its constants as signed 64-bit integers; torch.int64 products wrap.
_GOLDEN = 0x9E3779B97F4A7C15 - 2**64
_MULTIPLIER_1 = 0xBF58476D1CE4E5B9 - 2**64
_MULTIPLIER_2 = 0x94D049BB133111EB - 2**64

# lowbias32 (Wellons 2018): on CPUs 32-bit products are ten times as fast.
_GOLDEN_32 = 0x9E3779B9 - 2**32
_MULTIPLIER_1_32 = 0x21F0AAAD
_MULTIPLIER_2_32 = 0xD35A2D97 - 2**32
_CACHED_ELEMENTS = 2**18  # of [B, V], computed at once on CPUs: several passes over what the cache holds


def _shift_right(bits: Tensor, count: int) -> Tensor:
    return (bits >> count).bitwise_and_((1 << (64 - count)) - 1)  # >> of int64 keeps the sign: mask it off


def _mix(bits: Tensor) -> Tensor:
    """splitmix64's finalizer, in place: a bijection of int64 in which every input bit reaches every output bit."""
    bits.bitwise_xor_(_shift_right(bits, 30)).mul_(_MULTIPLIER_1)
    bits.bitwise_xor_(_shift_right(bits, 27)).mul_(_MULTIPLIER_2)
    return bits.bitwise_xor_(_shift_right(bits, 31))


def _mix_32(bits: Tensor) -> Tensor:
    """lowbias32, in place: the same for int32."""
    shifted = torch.empty_like(bits)
    for count, multiplier in ((16, _MULTIPLIER_1_32), (15, _MULTIPLIER_2_32)):
        torch.bitwise_right_shift(bits, count, out=shifted)
        bits.bitwise_xor_(shifted.bitwise_and_((1 << (32 - count)) - 1)).mul_(multiplier)
    torch.bitwise_right_shift(bits, 15, out=shifted)
    return bits.bitwise_xor_(shifted.bitwise_and_((1 << 17) - 1))


def sampling_keys(seed: int, epoch_B: Tensor, prompt_id_B: Tensor, sibling_B: Tensor) -> Tensor:
    """Folds what identifies a response into one key per row: int64 [B] from three int64 [B] and the run seed."""
    key_B = torch.full_like(epoch_B, seed)
    key_B = _mix(key_B + _GOLDEN)
    for field_B in (epoch_B, prompt_id_B, sibling_B):
        key_B = _mix(key_B + field_B + _GOLDEN)
    return key_B


def _random_words(word_B4: Tensor, token_V: Tensor) -> tuple[Tensor, Tensor]:
    """Two int32 [B, V], from 128 bits per row. The second one is mixed less: it only refines the first."""
    add_B1, multiply_B1, add_2_B1, multiply_2_B1 = word_B4.split(1, dim=-1)
    bits_BV = _mix_32((token_V ^ add_B1).mul_(multiply_B1 | 1))
    return bits_BV, (token_V ^ add_2_B1).mul_(multiply_2_B1 | 1)


def _exponential(bits_BV: Tensor, fraction_BV: Tensor) -> Tensor:
    """Exponential(1) noise, float32, from random int32; overwrites them.

    u = (31 bits of the one + the other as a fraction) · 2⁻³¹ lies in [2⁻⁵⁵, 1 − 2⁻²⁴], and −log(1 − u) takes its small
    values, which win, from u near 0, where float32 is finest: tokens far below 2⁻²⁴ keep their true odds.
    """
    noise_BV = fraction_BV.float().mul_(2.0**-32).add_(0.5).add_(bits_BV.bitwise_and_(2**31 - 1))
    return noise_BV.mul_(-(2.0**-31)).clamp_(min=2.0**-24 - 1, max=-(2.0**-55)).log1p_().neg_()


def exponential_noise(key_B: Tensor, position_B: Tensor, vocab_size: int) -> Tensor:
    """Exponential(1) noise, float32 [B, V], always positive and finite.

    Args:
        key_B: int64 [B] of :func:`sampling_keys`.
        position_B: int64 [B], or a scalar tensor: index of the token within the response.
        vocab_size: V.
    """
    stream_B = _mix(key_B + position_B + _GOLDEN)
    word_B4 = torch.stack([stream_B, _mix(stream_B + _GOLDEN)], dim=-1).view(torch.int32)
    return _exponential(*_random_words(word_B4, _token_words(vocab_size, key_B.device)))


@functools.lru_cache(maxsize=4)
def _token_words(vocab_size: int, device: torch.device) -> Tensor:
    """int32 [V], the same at every step."""
    return torch.arange(1, vocab_size + 1, dtype=torch.int32, device=device).mul_(_GOLDEN_32)


def truncate(logits_BV: Tensor, top_p: float, top_k: int, min_p: float) -> Tensor:
    """Sets the logits of excluded tokens to −inf. Each limit applies to what the ones before it left.

    Order: top-k (the k likeliest; 0 = off), top-p (the fewest likeliest tokens whose mass reaches top_p; 1 = off),
    min-p (tokens with p ≥ min_p · max p; 0 = off). Equal logits rank by token id; the likeliest token always stays.
    """
    if 0 < top_k < logits_BV.shape[-1] or top_p < 1.0:
        sorted_BV, token_BV = logits_BV.sort(dim=-1, descending=True, stable=True)
        if top_k > 0:
            sorted_BV[:, top_k:] = float("-inf")
        if top_p < 1.0:
            probability_BV = sorted_BV.softmax(-1)
            mass_before_BV = probability_BV.cumsum(-1) - probability_BV
            excluded_BV = mass_before_BV >= top_p
            excluded_BV[:, 0] = False
            sorted_BV[excluded_BV] = float("-inf")
        logits_BV = torch.empty_like(logits_BV).scatter_(-1, token_BV, sorted_BV)
    if min_p > 0.0:
        floor_B1 = logits_BV.amax(-1, keepdim=True) + math.log(min_p)
        logits_BV = logits_BV.masked_fill(logits_BV < floor_B1, float("-inf"))
    return logits_BV


@torch.no_grad()
def choose_tokens(logits_BV: Tensor, key_B: Tensor, position_B: Tensor, *, temperature: float = 1.0,
                  top_p: float = 1.0, top_k: int = 0, min_p: float = 0.0) -> tuple[Tensor, Tensor, Tensor]:
    """Draws one token per row.

    Args:
        logits_BV: [B, V], any float dtype; computed with in float32.
        key_B, position_B: as in :func:`exponential_noise`.

    Returns:
        token_B: int64 [B] = argmin(noise / probability), of the tempered and truncated probabilities.
        logprob_B: float32 [B], of the token at temperature 1, not truncated.
        behaviour_logprob_B: float32 [B], of the token at ``temperature``, before truncation.
    """
    rows = max(1, _CACHED_ELEMENTS // logits_BV.shape[-1]) if logits_BV.device.type == "cpu" else max(1, len(logits_BV))
    if rows >= len(logits_BV):
        return _choose(logits_BV, key_B, position_B, temperature, top_p, top_k, min_p)
    chunks = zip(logits_BV.split(rows), key_B.split(rows), position_B.expand_as(key_B).split(rows), strict=True)
    drawn = [_choose(logits_bV, key_b, position_b, temperature, top_p, top_k, min_p)
             for logits_bV, key_b, position_b in chunks]
    token_B, logprob_B, behaviour_logprob_B = (torch.cat(parts) for parts in zip(*drawn, strict=True))
    return token_B, logprob_B, behaviour_logprob_B


def _choose(logits_BV: Tensor, key_B: Tensor, position_B: Tensor, temperature: float, top_p: float, top_k: int,
            min_p: float) -> tuple[Tensor, Tensor, Tensor]:
    logits_BV = logits_BV.float()
    tempered_BV = logits_BV if temperature == 1.0 else logits_BV / temperature
    odds_BV, total_B = _odds(tempered_BV)
    if (kept_BV := truncate(tempered_BV, top_p, top_k, min_p)) is not tempered_BV:
        odds_BV.masked_fill_(kept_BV.isneginf(), 0.0)
    token_B = _argmin(exponential_noise(key_B, position_B, logits_BV.shape[-1]).div_(odds_BV))
    behaviour_logprob_B = _gathered(tempered_BV, token_B) - total_B
    if temperature == 1.0:
        return token_B, behaviour_logprob_B, behaviour_logprob_B
    return token_B, _gathered(logits_BV, token_B) - logits_BV.logsumexp(-1), behaviour_logprob_B


def _odds(logits_BV: Tensor) -> tuple[Tensor, Tensor]:
    """Probabilities as multiples of the largest one, [B, V], and logsumexp [B]."""
    largest_B1 = logits_BV.amax(-1, keepdim=True)
    odds_BV = _exp_(logits_BV - largest_B1)
    return odds_BV, odds_BV.sum(-1).log_() + largest_B1[:, 0]


def _exp_(x: Tensor) -> Tensor:
    """In place; on CPUs by NumPy, which takes a third to a half of torch's time for it."""
    if x.device.type != "cpu":
        return x.exp_()
    np.exp(x.numpy(), out=x.numpy())
    return x


def _argmin(x_BV: Tensor) -> Tensor:
    """int64 [B]; on CPUs by NumPy, which takes a twentieth of torch's time for it."""
    return x_BV.argmin(-1) if x_BV.device.type != "cpu" else torch.from_numpy(x_BV.numpy().argmin(-1))


def _gathered(x_BV: Tensor, token_B: Tensor) -> Tensor:
    return x_BV.gather(-1, token_B[:, None])[:, 0]
