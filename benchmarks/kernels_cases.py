"""What the kernels benchmark calls: each operation with its inputs, its naive form, its sizes and its arithmetic.

An operation is added here with one function that makes inputs, one naive formulation and one entry in ``OPS``.

Shapes: P prompts, G responses per prompt, D embedding size, N packed tokens, H hidden size, S segments, V vocabulary,
T tokens of the longest response.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import chain
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from asa_kernels import (
    group_consistency,
    group_consistency_reference,
    segment_mean_reference,
    segment_means,
    token_f1,
    token_f1_reference,
    token_logprob,
    token_logprob_reference,
)

SEED = 0
Sizes = dict[str, int]
Outputs = tuple[Tensor, ...]


@dataclass(frozen=True)
class Problem:
    """The inputs of one call, and what flows back into it.

    Args:
        arguments: of the public function; tensors, or (nested) sequences with tensors.
        differentiable: those of them that have a gradient.
        output_gradients: one for each output, float32.
        linear_in: tensors of ``arguments`` that no gradient depends on.
    """

    arguments: tuple[Any, ...]
    differentiable: Outputs
    output_gradients: Outputs
    linear_in: Outputs = ()

    def forward(self, function: Callable[..., Outputs]) -> Outputs:
        return function(*self.arguments)

    def backward(self, outputs: Outputs) -> tuple[Tensor | None, ...]:
        """The gradients of ``differentiable``; None for those that do not take part."""
        if not any(output.requires_grad for output in outputs):
            return ()
        arriving = self.output_gradients[: len(outputs)]
        return torch.autograd.grad(outputs, self.differentiable, arriving, allow_unused=True)

    @property
    def minimum_bytes(self) -> tuple[int, int]:
        """Forward and backward, when each input is read once and each output written once."""
        read = sum(tensor.nbytes for tensor in tensors_in(self.arguments))
        outputs = sum(tensor.nbytes for tensor in self.output_gradients)
        gradients = sum(tensor.nbytes for tensor in self.differentiable)
        needed = read - sum(tensor.nbytes for tensor in self.linear_in)
        return read + outputs, (needed + outputs + gradients if self.differentiable else 0)


def tensors_in(values: Any) -> list[Tensor]:
    """All tensors in nested lists and tuples."""
    if isinstance(values, Tensor):
        return [values]
    return list(chain.from_iterable(map(tensors_in, values))) if isinstance(values, (list, tuple)) else []


@dataclass(frozen=True)
class Promise:
    """Of forward + backward in PyTorch on a CPU, as shares of the naive form's."""

    time_at_most: float
    memory_at_most: float


@dataclass(frozen=True)
class Op:
    """One operation.

    Args:
        make: inputs for (sizes, dtype, device).
        calls: the public function as it is used, with keyword ``backend``; the first is the one that is measured.
        reference: the same as the first of ``calls`` on float64 inputs.
        naive: how one would write it without this package.
        operations: additions, multiplications and comparisons of (forward, backward).
        compile_sizes: few prompts or tokens, but every entry of its table of block sizes, the largest first; at last
            sizes that nothing divides.
        traffic_sizes, traffic_options: for the interpreter, in the proportions of ``gpu_sizes``.
        check_sizes: for the comparison with the reference on a GPU.
        cpu_sizes, short_sizes: for the comparison with ``naive`` on a CPU.
        gpu_sizes: as in training a model of 7 B parameters.
        dtypes: of its float inputs.
    """

    name: str
    make: Callable[[Sizes, torch.dtype, str], Problem]
    calls: tuple[Callable[..., Outputs], ...]
    reference: Callable[..., Outputs]
    naive: Callable[..., Outputs]
    operations: Callable[[Sizes], tuple[int, int]]
    compile_sizes: tuple[Sizes, ...]
    traffic_sizes: Sizes
    check_sizes: tuple[Sizes, ...]
    cpu_sizes: Sizes
    short_sizes: Sizes
    gpu_sizes: Sizes
    dtypes: tuple[torch.dtype, ...] = (torch.bfloat16, torch.float16, torch.float32)
    traffic_options: dict[str, Any] = field(default_factory=dict)
    promise: Promise | None = None


class Random:
    """Seeded tensors, drawn on the CPU, so that every device gets the same."""

    def __init__(self, dtype: torch.dtype, device: str) -> None:
        self._generator = torch.Generator().manual_seed(SEED)
        self._dtype, self._device = dtype, device

    def input(self, *shape: int, scale: float = 1.0) -> Tensor:
        """Normal, differentiable."""
        values = torch.randn(shape, generator=self._generator) * scale
        return values.to(self._device, self._dtype).requires_grad_()

    def gradients(self, *shapes: tuple[int, ...]) -> Outputs:
        """Normal, float32."""
        return tuple(torch.randn(shape, generator=self._generator).to(self._device) for shape in shapes)

    def integers(self, low: int, high: int, *shape: int) -> Tensor:
        """From low … high − 1."""
        return torch.randint(low, high, shape, generator=self._generator).to(self._device)


# --- group_consistency --------------------------------------------------------------------------------------------
def make_group_consistency(sizes: Sizes, dtype: torch.dtype, device: str) -> Problem:
    P, G, D = sizes["P"], sizes["G"], sizes["D"]
    random = Random(dtype, device)
    inputs = (random.input(P, G, D), *(random.input(D, scale=D**-0.5) for _ in range(2)), random.input())
    return Problem(inputs, inputs, random.gradients((P, G), (P, G, G), (P, G, G)))


def naive_group_consistency(embedding_PGD: Tensor, w_left_D: Tensor, w_right_D: Tensor, bias: Tensor) -> Outputs:
    """The indicator on concatenated pairs, as the equation is written: [P, G, G, 2D]."""
    P, G, D = embedding_PGD.shape
    left_PGGD = embedding_PGD.unsqueeze(2).expand(P, G, G, D)
    right_PGGD = embedding_PGD.unsqueeze(1).expand(P, G, G, D)
    cosine_PGG = F.cosine_similarity(left_PGGD, right_PGGD, dim=-1)
    pair_PGG2D = torch.cat([left_PGGD, right_PGGD], dim=-1)
    indicator_PGG = torch.sigmoid(pair_PGG2D @ torch.cat([w_left_D, w_right_D]) + bias)
    sibling_GG = ~torch.eye(G, dtype=torch.bool, device=embedding_PGD.device)
    consistency_PG = (cosine_PGG * indicator_PGG * sibling_GG).sum(dim=-1) / (G - 1)
    return consistency_PG, cosine_PGG, indicator_PGG


def masked_group_consistency(embedding_PGD: Tensor, *weights: Tensor, **options: Any) -> Outputs:
    """As the trainer calls it: some responses invalid, trunk detached."""
    valid_PG = torch.ones(embedding_PGD.shape[:2], dtype=torch.bool, device=embedding_PGD.device)
    valid_PG[0, 0] = False
    return group_consistency(embedding_PGD.detach(), *weights, valid_PG, return_indicator=True, **options)


def group_consistency_operations(sizes: Sizes) -> tuple[int, int]:
    gram = 2 * sizes["P"] * sizes["G"] ** 2 * sizes["D"]
    two_products = 4 * sizes["P"] * sizes["G"] * sizes["D"]
    return gram + two_products, gram + 2 * two_products  # backward: M · E; both weights, and their share of E


# --- segment_means ------------------------------------------------------------------------------------------------
def make_segment_means(sizes: Sizes, dtype: torch.dtype, device: str) -> Problem:
    """Responses of about equal length, each cut into claims with gaps between them."""
    N, H, num_responses, num_claims = sizes["N"], sizes["H"], sizes["responses"], sizes["claims"]
    random = Random(dtype, device)
    position_N = torch.arange(N)
    response_N = position_N * num_responses // N
    claim_N = torch.where(position_N % 16 == 0, -1, position_N * num_claims // N)
    segmentations = [(claim_N.to(device), num_claims), (response_N.to(device), num_responses)]
    hidden_NH = random.input(N, H)
    arriving = random.gradients((num_claims, H), (num_responses, H))
    return Problem((hidden_NH, segmentations), (hidden_NH,), arriving, linear_in=(hidden_NH,))


def naive_segment_means(hidden_NH: Tensor, segmentations: Sequence[tuple[Tensor, int]]) -> Outputs:
    """A membership matrix [S, N] for each segmentation."""
    pooled = []
    for segment_ids_N, num_segments in segmentations:
        segment_S1 = torch.arange(num_segments, device=hidden_NH.device).unsqueeze(1)
        member_SN = (segment_ids_N == segment_S1).to(hidden_NH.dtype)
        pooled.append(member_SN @ hidden_NH / member_SN.sum(dim=1, keepdim=True).clamp(min=1))
    return tuple(pooled)


def segment_means_reference(hidden_NH: Tensor, segmentations: Sequence[tuple[Tensor, int]]) -> Outputs:
    return tuple(segment_mean_reference(hidden_NH, *segmentation) for segmentation in segmentations)


# --- token_logprob ------------------------------------------------------------------------------------------------
def make_token_logprob(sizes: Sizes, dtype: torch.dtype, device: str) -> Problem:
    N, H, V = sizes["N"], sizes["H"], sizes["V"]
    random = Random(dtype, device)
    inputs = (random.input(N, H), random.input(V, H, scale=H**-0.5))
    return Problem((*inputs, random.integers(0, V, N)), inputs, random.gradients((N,), (N,)))


def naive_token_logprob(hidden_NH: Tensor, weight_VH: Tensor, target_N: Tensor) -> Outputs:
    """All logits, their log-softmax, and the entropy from both."""
    logprob_NV = torch.log_softmax((hidden_NH @ weight_VH.T).float(), dim=-1)
    chosen_N = logprob_NV.gather(1, target_N.unsqueeze(1)).squeeze(1)
    return chosen_N, -(logprob_NV.exp() * logprob_NV).sum(dim=-1)


def token_logprob_without_entropy(*arguments: Tensor, **options: Any) -> Outputs:
    return token_logprob(*arguments, temperature=0.7, **options)[:1]


def token_logprob_operations(sizes: Sizes) -> tuple[int, int]:
    product = 2 * sizes["N"] * sizes["H"] * sizes["V"]
    return product, 3 * product  # backward: the logits again, two gradients


# --- token_f1 -----------------------------------------------------------------------------------------------------
def make_token_f1(sizes: Sizes, dtype: torch.dtype, device: str) -> Problem:
    P, G, T, V = sizes["P"], sizes["G"], sizes["T"], sizes["V"]
    random = Random(dtype, device)
    tokens_PGT = random.integers(0, V, P, G, T) * random.integers(0, 2, P, G, T)  # half of them token 0: repetitions
    weight_V = torch.linspace(0.5, 1.5, V, device=device, dtype=dtype)
    lengths_PG = random.integers(T // 2, T + 1, P, G)
    return Problem((tokens_PGT, lengths_PG, weight_V), (), random.gradients((P, G, G)))


def weighted_token_f1(tokens_PGT: Tensor, lengths_PG: Tensor, weight_V: Tensor, **options: Any) -> Outputs:
    return (token_f1(tokens_PGT, lengths_PG, weight_V, **options),)


def plain_token_f1(tokens_PGT: Tensor, lengths_PG: Tensor, weight_V: Tensor, **options: Any) -> Outputs:
    return (token_f1(tokens_PGT, lengths_PG, **options),)


def naive_token_f1(tokens_PGT: Tensor, lengths_PG: Tensor, weight_V: Tensor) -> Outputs:
    """Counts over the vocabulary, and their minimum for every pair: [P, G, G, V]."""
    P, G, T = tokens_PGT.shape
    inside_PGT = torch.arange(T, device=tokens_PGT.device) < lengths_PG.unsqueeze(-1)
    count_PGV = weight_V.new_zeros(P, G, weight_V.shape[0]).scatter_add(2, tokens_PGT, inside_PGT.to(weight_V.dtype))
    shared_PGGV = torch.minimum(count_PGV.unsqueeze(2), count_PGV.unsqueeze(1))
    total_PG = count_PGV @ weight_V
    total_PGG = total_PG.unsqueeze(2) + total_PG.unsqueeze(1)
    return (2 * (shared_PGGV @ weight_V) / total_PGG.clamp(min=1e-9),)


def token_f1_operations(sizes: Sizes) -> tuple[int, int]:
    pairs = sizes["P"] * sizes["G"] * (sizes["G"] + 1) // 2  # i ≤ j: the F1 is symmetric
    return 2 * pairs * sizes["T"] ** 2, 0  # compare every token with every token, and count


OPS = {
    op.name: op
    for op in (
        Op(
            "group_consistency", make_group_consistency,
            (partial(group_consistency, return_indicator=True), group_consistency, masked_group_consistency),
            group_consistency_reference, naive_group_consistency, group_consistency_operations,
            compile_sizes=tuple({"P": 8, "G": G, "D": D} for G, D in ((64, 4096), (8, 1024), (32, 1024), (7, 501))),
            traffic_sizes={"P": 32, "G": 8, "D": 1024},
            check_sizes=({"P": 3, "G": 7, "D": 63}, {"P": 9, "G": 8, "D": 1024}, {"P": 1, "G": 64, "D": 500}),
            cpu_sizes={"P": 256, "G": 8, "D": 1024}, short_sizes={"P": 8, "G": 8, "D": 256},
            gpu_sizes={"P": 256, "G": 8, "D": 4096}, promise=Promise(time_at_most=1 / 5, memory_at_most=1 / 4),
        ),
        Op(
            "segment_means", make_segment_means, (segment_means,), segment_means_reference, naive_segment_means,
            lambda sizes: (2 * sizes["N"] * sizes["H"],) * 2,
            compile_sizes=tuple({"N": 512, "H": H, "responses": 8, "claims": 24} for H in (1024, 4096, 501)),
            traffic_sizes={"N": 1024, "H": 512, "responses": 8, "claims": 32},
            check_sizes=({"N": 501, "H": 63, "responses": 7, "claims": 33},
                         {"N": 2048, "H": 1024, "responses": 16, "claims": 64}),
            cpu_sizes={"N": 8192, "H": 1024, "responses": 64, "claims": 256},
            short_sizes={"N": 512, "H": 128, "responses": 4, "claims": 16},
            gpu_sizes={"N": 16384, "H": 4096, "responses": 128, "claims": 512},
        ),
        Op(
            "token_logprob", make_token_logprob, (token_logprob, token_logprob_without_entropy),
            token_logprob_reference, naive_token_logprob, token_logprob_operations,
            compile_sizes=({"N": 64, "H": 64, "V": 32000}, {"N": 63, "H": 63, "V": 1003}),
            traffic_sizes={"N": 256, "H": 64, "V": 512}, traffic_options={"chunk_tokens": 16},
            check_sizes=({"N": 63, "H": 65, "V": 1003}, {"N": 501, "H": 256, "V": 4096}),
            cpu_sizes={"N": 4096, "H": 512, "V": 32000}, short_sizes={"N": 256, "H": 64, "V": 1000},
            gpu_sizes={"N": 16384, "H": 4096, "V": 32768}, promise=Promise(time_at_most=1.4, memory_at_most=1 / 4),
        ),
        Op(
            "token_f1", make_token_f1, (weighted_token_f1, plain_token_f1),
            lambda *arguments: (token_f1_reference(*arguments),), naive_token_f1, token_f1_operations,
            compile_sizes=({"P": 4, "G": 8, "T": 128, "V": 32000}, {"P": 3, "G": 5, "T": 501, "V": 1003}),
            traffic_sizes={"P": 2, "G": 8, "T": 128, "V": 256},
            check_sizes=({"P": 3, "G": 5, "T": 63, "V": 40}, {"P": 2, "G": 8, "T": 500, "V": 1003}),
            cpu_sizes={"P": 32, "G": 8, "T": 128, "V": 32000}, short_sizes={"P": 2, "G": 4, "T": 32, "V": 100},
            gpu_sizes={"P": 256, "G": 8, "T": 128, "V": 32768}, dtypes=(torch.float32,),
        ),
    )
}


def largest_difference(value: Tensor, right: Tensor) -> float:
    """As a share of the right one's largest value; NaN if either holds one."""
    value, right = value.detach().cpu().double(), right.detach().cpu().double()
    return float((value - right).abs().max() / right.abs().max().clamp(min=1e-30))


def sizes_text(sizes: Sizes) -> str:
    return ", ".join(f"{name} = {value:,}" for name, value in sizes.items())


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
