"""Log-probability of given tokens and entropy of the whole distribution, without ever holding all logits.

    x_nv      = hidden_n · weight_v / temperature
    logprob_n = x_n[target_n] − log Σ_v exp(x_nv)
    entropy_n = −Σ_v p_nv log p_nv,   p_n = softmax(x_n)

    ∂logprob/∂x_v = [v = target] − p_v        ∂entropy/∂x_v = −p_v (log p_v + entropy)

Rows are taken ``chunk_tokens`` at a time, and the backward pass computes a chunk's logits again instead of keeping
them: beside the gradients themselves, at most two float32 tensors of chunk_tokens · V elements exist.

Shapes: N tokens, H hidden size, V vocabulary, C tokens of one chunk, B rows of one block of the weight.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

IGNORED = -100
_BLOCK_ROWS = 4096


def token_logprob_reference(
    hidden_NH: Tensor, weight_VH: Tensor, target_N: Tensor, temperature: float = 1.0
) -> tuple[Tensor, Tensor]:
    """The formula on whole logits, in the dtype of its inputs."""
    logprob_NV = torch.log_softmax(hidden_NH @ weight_VH.T / temperature, dim=-1)
    ignored_N = target_N == IGNORED
    chosen_N = logprob_NV.gather(1, target_N.masked_fill(ignored_N, 0).unsqueeze(1)).squeeze(1)
    entropy_N = -(logprob_NV.exp() * logprob_NV).sum(dim=-1)
    return chosen_N.masked_fill(ignored_N, 0), entropy_N.masked_fill(ignored_N, 0)


def _float32_blocks(weight_VH: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """The weight in float32: whole if it is that already, else widened block by block, so that no such copy exists."""
    num_rows = weight_VH.shape[0]
    block_rows = num_rows if weight_VH.dtype == torch.float32 else _BLOCK_ROWS
    for start in range(0, num_rows, block_rows):
        rows = slice(start, start + block_rows)
        yield rows, weight_VH[rows].float()


def _logits(scaled_CH: Tensor, weight_VH: Tensor) -> Tensor:
    logits_CV = scaled_CH.new_empty(scaled_CH.shape[0], weight_VH.shape[0])
    for rows, weight_BH in _float32_blocks(weight_VH):
        torch.mm(scaled_CH, weight_BH.T, out=logits_CV[:, rows])
    return logits_CV


def _chunk_outputs(logits_CV: Tensor, target_C: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(log-probability of the target, entropy, log normaliser); overwrites ``logits_CV``."""
    log_normaliser_C = logits_CV.logsumexp(dim=-1)
    logprob_CV = logits_CV.sub_(log_normaliser_C.unsqueeze(1))
    chosen_C = logprob_CV.gather(1, target_C.unsqueeze(1)).squeeze(1)
    entropy_C = -logprob_CV.exp().mul_(logprob_CV).sum(dim=-1)
    return chosen_C, entropy_C, log_normaliser_C


def _chunk_logits_gradient(
    logprob_CV: Tensor, target_C: Tensor, entropy_C: Tensor, d_logprob_C: Tensor, d_entropy_C: Tensor | None
) -> Tensor:
    """Both outputs' gradients by the logits; overwrites ``logprob_CV``."""
    if d_entropy_C is None:
        d_logits_CV = logprob_CV.exp_().mul_(-d_logprob_C.unsqueeze(1))
    else:
        probability_CV = logprob_CV.exp()
        d_logits_CV = logprob_CV.add_(entropy_C.unsqueeze(1)).mul_(-d_entropy_C.unsqueeze(1))
        d_logits_CV.sub_(d_logprob_C.unsqueeze(1)).mul_(probability_CV)
    return d_logits_CV.scatter_add_(1, target_C.unsqueeze(1), d_logprob_C.unsqueeze(1))


class _TokenLogprob(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden_NH: Tensor, weight_VH: Tensor, target_N: Tensor, temperature: float, chunk_tokens: int
    ) -> tuple[Tensor, Tensor]:
        logprob_N = hidden_NH.new_zeros(target_N.shape, dtype=torch.float32)
        entropy_N = torch.zeros_like(logprob_N)
        log_normaliser_N = torch.zeros_like(logprob_N)
        for rows_C in (target_N != IGNORED).nonzero().squeeze(1).split(chunk_tokens):
            scaled_CH = hidden_NH[rows_C].float() / temperature
            logprob_N[rows_C], entropy_N[rows_C], log_normaliser_N[rows_C] = _chunk_outputs(
                _logits(scaled_CH, weight_VH), target_N[rows_C]
            )
        # The weight itself, not a copy: ZeRO-3 frees and refills the parameter's data between the two passes.
        ctx.save_for_backward(hidden_NH, weight_VH, target_N, log_normaliser_N, entropy_N)
        ctx.temperature, ctx.chunk_tokens = temperature, chunk_tokens
        ctx.set_materialize_grads(False)  # an output without gradient arrives as None
        return logprob_N, entropy_N

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_logprob_N: Tensor | None, d_entropy_N: Tensor | None) -> tuple[Tensor | None, ...]:
        hidden_NH, weight_VH, target_N, log_normaliser_N, entropy_N = ctx.saved_tensors
        needs_hidden, needs_weight = ctx.needs_input_grad[:2]
        d_hidden_NH = torch.zeros_like(hidden_NH) if needs_hidden else None
        d_weight_VH = torch.zeros_like(weight_VH, dtype=torch.float32) if needs_weight else None
        if d_logprob_N is None:
            d_logprob_N = torch.zeros_like(log_normaliser_N)

        for rows_C in (target_N != IGNORED).nonzero().squeeze(1).split(ctx.chunk_tokens):
            scaled_CH = hidden_NH[rows_C].float() / ctx.temperature
            d_logits_CV = _chunk_logits_gradient(
                _logits(scaled_CH, weight_VH).sub_(log_normaliser_N[rows_C].unsqueeze(1)),
                target_N[rows_C],
                entropy_N[rows_C],
                d_logprob_N[rows_C],
                None if d_entropy_N is None else d_entropy_N[rows_C],
            )
            if d_weight_VH is not None:
                d_weight_VH.addmm_(d_logits_CV.T, scaled_CH)
            if d_hidden_NH is not None:
                d_scaled_CH = torch.zeros_like(scaled_CH)
                for rows, weight_BH in _float32_blocks(weight_VH):
                    d_scaled_CH.addmm_(d_logits_CV[:, rows], weight_BH)
                d_hidden_NH[rows_C] = d_scaled_CH.div_(ctx.temperature).to(hidden_NH.dtype)
            del d_logits_CV  # before the next chunk's logits exist

        return d_hidden_NH, None if d_weight_VH is None else d_weight_VH.to(weight_VH.dtype), None, None, None


def token_logprob(
    hidden_NH: Tensor, weight_VH: Tensor, target_N: Tensor, temperature: float = 1.0, chunk_tokens: int = 1024
) -> tuple[Tensor, Tensor]:
    """Log-probability of each target, and entropy, in nats, of the distribution it was taken from.

    Args:
        hidden_NH: final hidden states, any float dtype; products are accumulated in float32.
        weight_VH: the output projection, any float dtype. Under ZeRO-3 pass the parameter itself, inside the
            forward of the module that owns it.
        target_N: int64, 0 … V − 1, or −100 = ignored: both outputs and all gradients are 0, and no work is done.
        temperature: divides the logits, > 0.
        chunk_tokens: rows whose logits exist at the same time, ≥ 1.

    Returns:
        ``(logprob_N, entropy_N)``, float32, both differentiable (once) in ``hidden_NH`` and ``weight_VH``; the
        weight's gradient is accumulated in float32. Work for the entropy's gradient is done only if it has one.

    Raises:
        ValueError: temperature or chunk_tokens out of range.
        RuntimeError: shapes that do not fit, or a target outside the vocabulary (on a GPU a device-side assertion).
    """
    if not temperature > 0:
        raise ValueError(f"token_logprob: temperature must be > 0, got {temperature}")
    if chunk_tokens < 1:
        raise ValueError(f"token_logprob: chunk_tokens must be at least 1, got {chunk_tokens}")
    return _TokenLogprob.apply(hidden_NH, weight_VH, target_N, float(temperature), chunk_tokens)
