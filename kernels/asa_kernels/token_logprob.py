"""Log-probability of given tokens and entropy of the whole distribution, without ever holding all logits.

    x_nv      = hidden_n · weight_v / temperature
    logprob_n = x_n[target_n] − log Σ_v exp(x_nv)
    entropy_n = −Σ_v p_nv log p_nv,   p_n = softmax(x_n)

With m_n = max_v x_nv, s_n = Σ_v exp(x_nv − m_n) and a_n = Σ_v (x_nv − m_n) exp(x_nv − m_n):

    log normaliser = m_n + log s_n          entropy_n = log s_n − a_n / s_n
    ∂logprob/∂x_v  = [v = target] − p_v     ∂entropy/∂x_v = −p_v (log p_v + entropy)

Rows are taken ``chunk_tokens`` at a time, and the backward pass computes a chunk's logits again instead of keeping
them: beside the gradients themselves, one float32 tensor of chunk_tokens · V elements exists, and in Triton with
low-precision inputs one of their dtype. The weight's gradient is summed in float32: for a low-precision weight that
sum, [V, H], exists too, and at the end beside the gradient that is made of it; on a CPU a chunk's share of it, too,
where that is no larger than the chunk's logits. The temperature is the scale of the matrix products. Beside those, the
kernels read a logit once (4 bytes) in either pass, and write its gradient once: 4 bytes, in its place, or 2 in low
precision.

Shapes: N tokens, M tokens that are not ignored, H hidden size, V vocabulary, C tokens of one chunk,
R tokens of one block of a chunk, B rows of one block of the weight, L = BLOCK neighbouring logits.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from asa_kernels.backend import Backend, jit, tl, triton, uses_triton
from asa_kernels.cpu_linear import product, takes_onednn

IGNORED = -100
_WEIGHT_BLOCK_ROWS = 4096
_CACHED_LOGITS = 2**18  # logits that the CPU's elementwise operations take at a time: what its cache holds

# Fixed, not tuned: both kernels only stream logits, and so no rank of a cluster ever tunes.
_BLOCKS = {"BLOCK": 2048, "num_warps": 8}


def token_logprob_reference(
    hidden_NH: Tensor, weight_VH: Tensor, target_N: Tensor, temperature: float = 1.0
) -> tuple[Tensor, Tensor]:
    """The formula on whole logits, in the dtype of its inputs."""
    logprob_NV = torch.log_softmax(hidden_NH @ weight_VH.T / temperature, dim=-1)
    ignored_N = target_N == IGNORED
    chosen_N = logprob_NV.gather(1, target_N.masked_fill(ignored_N, 0).unsqueeze(1)).squeeze(1)
    entropy_N = -(logprob_NV.exp() * logprob_NV).sum(dim=-1)
    return chosen_N.masked_fill(ignored_N, 0), entropy_N.masked_fill(ignored_N, 0)


# ---- Matrix products ----


def _product_dtype(hidden_NH: Tensor, weight_VH: Tensor, on_triton: bool) -> torch.dtype:
    """What factors are cast to: float32, or beside the kernels the low precision that tensor cores multiply."""
    is_low = hidden_NH.dtype == weight_VH.dtype and hidden_NH.dtype in (torch.bfloat16, torch.float16)
    return hidden_NH.dtype if on_triton and is_low else torch.float32


def _multiply(out_MN: Tensor, left_MK: Tensor, right_KN: Tensor, scale: float, keep: int) -> None:
    """out = scale · left · right + keep · out, in float32 whatever the dtype of both factors."""
    if left_MK.dtype == torch.float32 or not out_MN.is_cuda:  # CPUs have no such product: interpreted kernels only
        out_MN.addmm_(left_MK.float(), right_KN.float(), beta=keep, alpha=scale)
    else:
        torch.addmm(out_MN, left_MK, right_KN, out_dtype=torch.float32, beta=keep, alpha=scale, out=out_MN)


def _weight_blocks(weight_VH: Tensor, dtype: torch.dtype) -> Iterator[tuple[slice, Tensor]]:
    """The weight in ``dtype``: whole if it is that already, else block by block, so that no such copy exists."""
    num_rows = weight_VH.shape[0]
    block_rows = num_rows if weight_VH.dtype == dtype else _WEIGHT_BLOCK_ROWS
    for start in range(0, num_rows, block_rows):
        rows = slice(start, start + block_rows)
        yield rows, weight_VH[rows].to(dtype)


def _logits(
    scratch_CV: Tensor, hidden_CH: Tensor, weight_VH: Tensor, temperature: float, on_triton: bool
) -> Tensor:
    """In ``scratch_CV``, or instead of it."""
    if not on_triton and takes_onednn(hidden_CH, weight_VH):
        return product(hidden_CH, weight_VH).div_(temperature)
    logits_CV = scratch_CV[: len(hidden_CH)]
    for rows, weight_BH in _weight_blocks(weight_VH, hidden_CH.dtype):
        _multiply(logits_CV[:, rows], hidden_CH, weight_BH.T, 1 / temperature, keep=0)
    return logits_CV


def _d_hidden(
    d_logits_CV: Tensor, hidden_CH: Tensor, weight_VH: Tensor, scale: float, on_triton: bool
) -> Tensor:
    if not on_triton and takes_onednn(d_logits_CV, weight_VH.T):
        return product(d_logits_CV, weight_VH.T).mul_(scale)
    d_hidden_CH = torch.zeros_like(hidden_CH, dtype=torch.float32)
    for rows, weight_BH in _weight_blocks(weight_VH, hidden_CH.dtype):
        _multiply(d_hidden_CH, d_logits_CV[:, rows], weight_BH, scale, keep=1)
    return d_hidden_CH


def _add_d_weight(
    d_weight_VH: Tensor, d_logits_CV: Tensor, hidden_CH: Tensor, scale: float, on_triton: bool
) -> None:
    is_small = d_weight_VH.shape[1] <= len(d_logits_CV)  # beside the chunk's logits
    if not on_triton and is_small and takes_onednn(d_logits_CV.T, hidden_CH.T):
        d_weight_VH.add_(product(d_logits_CV.T, hidden_CH.T), alpha=scale)
    else:
        _multiply(d_weight_VH, d_logits_CV.T, hidden_CH, scale, keep=1)


# ---- What happens to a chunk's logits, in PyTorch ----


def _row_blocks(logits_CV: Tensor) -> Iterator[slice]:
    num_rows, vocabulary = logits_CV.shape
    block_rows = num_rows if logits_CV.is_cuda else max(1, _CACHED_LOGITS // vocabulary)
    for start in range(0, num_rows, block_rows):
        yield slice(start, start + block_rows)


def _torch_forward(
    logits_CV: Tensor, target_C: Tensor, logprob_C: Tensor, entropy_C: Tensor, log_normaliser_C: Tensor
) -> None:
    """Fills the last three; overwrites ``logits_CV``."""
    for rows in _row_blocks(logits_CV):
        logits_RV = logits_CV[rows]
        maximum_R = logits_RV.amax(dim=-1)
        gap_RV = logits_RV.sub_(maximum_R.unsqueeze(1))
        weight_RV = gap_RV.exp()
        total_R = weight_RV.sum(dim=-1)
        log_total_R = total_R.log()
        logprob_C[rows] = gap_RV.gather(1, target_C[rows].unsqueeze(1)).squeeze(1) - log_total_R
        entropy_C[rows] = log_total_R - weight_RV.mul_(gap_RV).sum(dim=-1) / total_R
        log_normaliser_C[rows] = maximum_R + log_total_R


def _torch_backward(
    logits_CV: Tensor,
    target_C: Tensor,
    log_normaliser_C: Tensor,
    entropy_C: Tensor,
    d_logprob_C: Tensor,
    d_entropy_C: Tensor | None,
) -> Tensor:
    """The gradient by the logits, written over them."""
    for rows in _row_blocks(logits_CV):
        logprob_RV = logits_CV[rows].sub_(log_normaliser_C[rows].unsqueeze(1))
        d_logprob_R1 = d_logprob_C[rows].unsqueeze(1)
        if d_entropy_C is None:
            d_logits_RV = logprob_RV.exp_().mul_(-d_logprob_R1)
        else:
            probability_RV = logprob_RV.exp()
            d_logits_RV = logprob_RV.add_(entropy_C[rows].unsqueeze(1)).mul_(-d_entropy_C[rows].unsqueeze(1))
            d_logits_RV.sub_(d_logprob_R1).mul_(probability_RV)
        d_logits_RV.scatter_add_(1, target_C[rows].unsqueeze(1), d_logprob_R1)
    return logits_CV


# ---- The same in Triton ----


@jit
def _forward_kernel(
    logits_ptr_CV: tl.tensor,
    target_ptr_C: tl.tensor,
    logprob_ptr_C: tl.tensor,
    entropy_ptr_C: tl.tensor,
    log_normaliser_ptr_C: tl.tensor,
    logits_stride: int,
    vocabulary: int,
    BLOCK: tl.constexpr,
) -> None:
    """One program per row. Each of its BLOCK lanes keeps m, s and a of its own logits; they are joined at the end."""
    row = tl.program_id(0).to(tl.int64)
    logits_ptr_V = logits_ptr_CV + row * logits_stride
    lane_L = tl.arange(0, BLOCK)
    maximum_L = tl.full([BLOCK], -3.0e38, tl.float32)  # finite: −∞ − (−∞) would be NaN
    total_L = tl.zeros([BLOCK], tl.float32)
    weighted_L = tl.zeros([BLOCK], tl.float32)
    for start in range(0, vocabulary, BLOCK):
        column_L = start + lane_L
        logit_L = tl.load(logits_ptr_V + column_L, mask=column_L < vocabulary, other=float("-inf"))
        is_larger_L = logit_L > maximum_L
        gap_L = -tl.abs(logit_L - maximum_L)
        gap_L = tl.where(gap_L < -1e4, -1e4, gap_L)  # exp is 0 either way, and 0 · gap stays 0; NaN stays NaN
        weight_L = tl.exp(gap_L)
        # Either the old sums shrink to the new maximum, or the new logit is weighed by the old one.
        weighted_L = tl.where(is_larger_L, (weighted_L + total_L * gap_L) * weight_L, weighted_L + gap_L * weight_L)
        total_L = tl.where(is_larger_L, total_L * weight_L + 1.0, total_L + weight_L)
        maximum_L = tl.where(is_larger_L, logit_L, maximum_L)

    maximum = tl.max(maximum_L, axis=0)
    gap_L = maximum_L - maximum
    gap_L = tl.where(gap_L < -1e4, -1e4, gap_L)
    weight_L = tl.exp(gap_L)
    total = tl.sum(total_L * weight_L, axis=0)
    weighted = tl.sum((weighted_L + total_L * gap_L) * weight_L, axis=0)

    target = tl.load(target_ptr_C + row)
    chosen = tl.load(logits_ptr_V + target, mask=(target >= 0) & (target < vocabulary), other=0.0)
    tl.store(logprob_ptr_C + row, chosen - maximum - tl.log(total))
    tl.store(entropy_ptr_C + row, tl.log(total) - weighted / total)
    tl.store(log_normaliser_ptr_C + row, maximum + tl.log(total))


@jit
def _backward_kernel(
    logits_ptr_CV: tl.tensor,
    d_logits_ptr_CV: tl.tensor,
    target_ptr_C: tl.tensor,
    log_normaliser_ptr_C: tl.tensor,
    entropy_ptr_C: tl.tensor,
    d_logprob_ptr_C: tl.tensor,
    d_entropy_ptr_C: tl.tensor,
    logits_stride: int,
    d_logits_stride: int,
    vocabulary: int,
    BLOCK: tl.constexpr,
) -> None:
    """One program per row and BLOCK logits. ``d_logits`` may be ``logits``; ``d_entropy`` may be None."""
    row = tl.program_id(0).to(tl.int64)
    column_L = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    is_inside_L = column_L < vocabulary
    logit_L = tl.load(logits_ptr_CV + row * logits_stride + column_L, mask=is_inside_L, other=0.0)
    d_logprob = tl.load(d_logprob_ptr_C + row)
    logprob_L = logit_L - tl.load(log_normaliser_ptr_C + row)
    d_by_probability_L = -d_logprob
    if d_entropy_ptr_C is not None:
        d_by_probability_L -= tl.load(d_entropy_ptr_C + row) * (logprob_L + tl.load(entropy_ptr_C + row))
    d_logit_L = tl.exp(logprob_L) * d_by_probability_L
    d_logit_L += tl.where(column_L == tl.load(target_ptr_C + row), d_logprob, 0.0)
    tl.store(d_logits_ptr_CV + row * d_logits_stride + column_L, d_logit_L, mask=is_inside_L)


def _triton_forward(
    logits_CV: Tensor, target_C: Tensor, logprob_C: Tensor, entropy_C: Tensor, log_normaliser_C: Tensor
) -> None:
    """Fills the last three."""
    num_rows, vocabulary = logits_CV.shape
    with torch.cuda.device_of(logits_CV):
        _forward_kernel[(num_rows,)](
            logits_CV,
            target_C,
            logprob_C,
            entropy_C,
            log_normaliser_C,
            logits_CV.stride(0),
            vocabulary,
            **_BLOCKS,
        )


def _triton_backward(
    logits_CV: Tensor,
    target_C: Tensor,
    log_normaliser_C: Tensor,
    entropy_C: Tensor,
    d_logprob_C: Tensor,
    d_entropy_C: Tensor | None,
    dtype: torch.dtype,
) -> Tensor:
    """The gradient by the logits in ``dtype``; written over them if that is theirs."""
    num_rows, vocabulary = logits_CV.shape
    d_logits_CV = logits_CV if dtype == logits_CV.dtype else torch.empty_like(logits_CV, dtype=dtype)
    with torch.cuda.device_of(logits_CV):
        _backward_kernel[(num_rows, triton.cdiv(vocabulary, _BLOCKS["BLOCK"]))](
            logits_CV,
            d_logits_CV,
            target_C,
            log_normaliser_C,
            entropy_C,
            d_logprob_C,
            d_entropy_C,
            logits_CV.stride(0),
            d_logits_CV.stride(0),
            vocabulary,
            **_BLOCKS,
        )
    return d_logits_CV


# ---- All chunks ----


def _chunks(num_tokens: int, chunk_tokens: int) -> list[slice]:
    return [slice(start, start + chunk_tokens) for start in range(0, num_tokens, chunk_tokens)]


class _TokenLogprob(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden_NH: Tensor,
        weight_VH: Tensor,
        target_N: Tensor,
        temperature: float,
        chunk_tokens: int,
        on_triton: bool,
    ) -> tuple[Tensor, Tensor]:
        vocabulary = weight_VH.shape[0]
        token_M = (target_N != IGNORED).nonzero().squeeze(1)
        target_M = target_N[token_M]
        torch._assert_async(
            ((target_M >= 0) & (target_M < vocabulary)).all(),
            f"token_logprob: target out of bounds: must be 0 … {vocabulary - 1}, or {IGNORED} for ignored tokens",
        )
        num_tokens = len(token_M)
        logprob_M, entropy_M, log_normaliser_M = hidden_NH.new_empty(3, num_tokens, dtype=torch.float32)
        scratch_CV = hidden_NH.new_empty(min(chunk_tokens, num_tokens), vocabulary, dtype=torch.float32)
        score = _triton_forward if on_triton else _torch_forward
        for chunk in _chunks(num_tokens, chunk_tokens):
            hidden_CH = hidden_NH[token_M[chunk]].to(_product_dtype(hidden_NH, weight_VH, on_triton))
            logits_CV = _logits(scratch_CV, hidden_CH, weight_VH, temperature, on_triton)
            score(logits_CV, target_M[chunk], logprob_M[chunk], entropy_M[chunk], log_normaliser_M[chunk])

        # The weight itself, not a copy: ZeRO-3 frees and refills the parameter's data between the two passes.
        ctx.save_for_backward(hidden_NH, weight_VH, token_M, target_M, log_normaliser_M, entropy_M)
        ctx.temperature, ctx.chunk_tokens, ctx.on_triton = temperature, chunk_tokens, on_triton
        ctx.set_materialize_grads(False)  # an output without gradient arrives as None
        zero_N = hidden_NH.new_zeros(len(target_N), dtype=torch.float32)
        return zero_N.index_copy(0, token_M, logprob_M), zero_N.index_copy(0, token_M, entropy_M)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_logprob_N: Tensor | None, d_entropy_N: Tensor | None) -> tuple[Tensor | None, ...]:
        hidden_NH, weight_VH, token_M, target_M, log_normaliser_M, entropy_M = ctx.saved_tensors
        needs_hidden, needs_weight = ctx.needs_input_grad[:2]
        d_hidden_NH = torch.zeros_like(hidden_NH) if needs_hidden else None
        d_weight_VH = torch.zeros_like(weight_VH, dtype=torch.float32) if needs_weight else None
        d_logprob_M = torch.zeros_like(entropy_M) if d_logprob_N is None else d_logprob_N[token_M]
        d_entropy_M = None if d_entropy_N is None else d_entropy_N[token_M]

        dtype, scale = _product_dtype(hidden_NH, weight_VH, ctx.on_triton), 1 / ctx.temperature
        shape = min(ctx.chunk_tokens, len(token_M)), weight_VH.shape[0]
        scratch_CV = hidden_NH.new_empty(shape, dtype=torch.float32)
        for chunk in _chunks(len(token_M), ctx.chunk_tokens):
            hidden_CH = hidden_NH[token_M[chunk]].to(dtype)
            logits_CV = _logits(scratch_CV, hidden_CH, weight_VH, ctx.temperature, ctx.on_triton)
            d_entropy_C = None if d_entropy_M is None else d_entropy_M[chunk]
            given = target_M[chunk], log_normaliser_M[chunk], entropy_M[chunk], d_logprob_M[chunk], d_entropy_C
            d_logits_CV = (
                _triton_backward(logits_CV, *given, dtype) if ctx.on_triton else _torch_backward(logits_CV, *given)
            )
            if d_weight_VH is not None:
                _add_d_weight(d_weight_VH, d_logits_CV, hidden_CH, scale, ctx.on_triton)
            if d_hidden_NH is not None:
                d_hidden_CH = _d_hidden(d_logits_CV, hidden_CH, weight_VH, scale, ctx.on_triton)
                d_hidden_NH[token_M[chunk]] = d_hidden_CH.to(hidden_NH.dtype)
            del d_logits_CV  # before the next chunk's exists

        return d_hidden_NH, None if d_weight_VH is None else d_weight_VH.to(weight_VH.dtype), None, None, None, None


def token_logprob(
    hidden_NH: Tensor,
    weight_VH: Tensor,
    target_N: Tensor,
    temperature: float = 1.0,
    chunk_tokens: int = 1024,
    *,
    backend: Backend = "auto",
) -> tuple[Tensor, Tensor]:
    """Log-probability of each target, and entropy, in nats, of the distribution it was taken from.

    Waits once for the GPU, which counts the tokens that are not ignored.

    Args:
        hidden_NH: final hidden states, any float dtype; products are accumulated in float32.
        weight_VH: the output projection, any float dtype. Under ZeRO-3 pass the parameter itself, inside the
            forward of the module that owns it.
        target_N: int64, 0 … V − 1, or −100 = ignored: both outputs and all gradients are 0, and no work is done.
        temperature: divides the logits, > 0.
        chunk_tokens: rows whose logits exist at the same time, ≥ 1.
        backend: "triton", "torch", or "auto" = Triton for tensors on a GPU.

    Returns:
        ``(logprob_N, entropy_N)``, float32, both differentiable (once) in ``hidden_NH`` and ``weight_VH``; the
        weight's gradient is accumulated in float32. Work for the entropy's gradient is done only if it has one.
        With Triton, if both inputs are bfloat16 or both float16, the logits' gradient is rounded to that dtype
        before it is multiplied; in float16 it wants a loss scale, as everywhere.

    Raises:
        ValueError: no such backend; temperature or chunk_tokens out of range.
        RuntimeError: shapes that do not fit, a target outside the vocabulary (on a GPU a device-side assertion), or
            ``"triton"`` where it cannot run.
    """
    if not temperature > 0:
        raise ValueError(f"token_logprob: temperature must be > 0, got {temperature}")
    if chunk_tokens < 1:
        raise ValueError(f"token_logprob: chunk_tokens must be at least 1, got {chunk_tokens}")
    if hidden_NH.shape != (*target_N.shape, weight_VH.shape[-1]):
        raise RuntimeError(
            f"token_logprob: shapes do not fit: hidden_NH {tuple(hidden_NH.shape)}, weight_VH "
            f"{tuple(weight_VH.shape)}, target_N {tuple(target_N.shape)}; N and H must be the same everywhere"
        )
    on_triton = uses_triton(backend, hidden_NH)
    return _TokenLogprob.apply(hidden_NH, weight_VH, target_N, float(temperature), chunk_tokens, on_triton)
