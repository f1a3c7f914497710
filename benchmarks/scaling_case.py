"""What `scaling.py` measures: loads of one, two and four ranks. Imports nothing heavy."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from step_case import Case

from asa_dist.config import Config
from asa_dist.plan.planning import changed

ONE_RANK = "1 rank"


@dataclass(frozen=True)
class Load:
    """A model and a step's rows, half corpus and half rollouts, shared by so many ranks.

    Args:
        row_pairs: of one rank; a pair is one row of each kind.
    """

    num_ranks: int
    row_pairs: int
    row_tokens: int = 128
    vocab_size: int = 4096
    hidden_size: int = 256
    num_layers: int = 4

    @property
    def case(self) -> Case:
        """One rank's rows."""
        return Case(3, self.row_tokens, self.row_pairs, self.row_pairs, self.vocab_size, self.hidden_size,
                    self.num_layers)

    @property
    def all_pairs(self) -> int:
        return self.num_ranks * self.row_pairs

    @property
    def config(self) -> Config:
        """As `step.py` has it, under ZeRO-3, with these ranks."""
        return changed(self.case.config, {"train.ranks": self.num_ranks, "train.corpus_rows_per_step": self.all_pairs,
                                          "rollout.prompts_per_step": self.all_pairs})


def loads_of(smallest: Load, rank_counts: Sequence[int]) -> dict[str, Load]:
    """Of every rank count the weak and the strong one, which for one rank are the same.

    Raises:
        ValueError: its rows cannot be shared equally.
    """
    if any(smallest.row_pairs % num_ranks for num_ranks in rank_counts):
        raise ValueError(f"{smallest.row_pairs} pairs of rows cannot be shared equally by ranks: {rank_counts}")
    loads = {}
    for num_ranks in rank_counts:
        weak = replace(smallest, num_ranks=num_ranks)
        if num_ranks == 1:
            loads[ONE_RANK] = weak
        else:
            loads[f"weak, {num_ranks} ranks"] = weak
            loads[f"strong, {num_ranks} ranks"] = replace(weak, row_pairs=smallest.row_pairs // num_ranks)
    return loads
