"""The pairs' feed: every pair once, wherever it is trained; what the reference said survives, or it says so."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from asa_dist.asa.packing import MicroBatch
from asa_dist.records import PreferencePair
from asa_dist.runtime.data.errors import DataError
from asa_dist.runtime.data.preferences import PreferenceFeed
from tests.asa import worlds
from tests.distributed.preference_cases import pairs

ROW, ALL = 48, range(7)


class CountingEngine:
    """One rank; the log-probability of each position is a number of its own, drawn anew in every forward."""

    def __init__(self, other_ranks_fail: bool = False) -> None:
        self.batches: list[MicroBatch] = []
        self._other_ranks_fail = other_ranks_fail
        self._rng = torch.Generator().manual_seed(3)

    def reference_logprobs(self, batches: Sequence[MicroBatch]) -> list[Tensor]:
        self.batches += batches
        return [-torch.rand(batch.target_RT.numel(), generator=self._rng) for batch in batches]

    def sum_over_ranks(self, values: Tensor) -> Tensor:
        return values.double()

    def max_over_ranks(self, values: Sequence[float]) -> list[float]:
        return [max(value, float(self._other_ranks_fail)) for value in values]


def feed(
    folder: Path, engine: CountingEngine, members: Sequence[PreferencePair] | None = None, accumulation_steps: int = 1,
    rank: int = 0, num_ranks: int = 1,
) -> PreferenceFeed:
    return PreferenceFeed(
        pairs() if members is None else members, engine, folder, worlds.TABLES, row_length=ROW, pairs_per_step=5,
        accumulation_steps=accumulation_steps, rank=rank, num_ranks=num_ranks,
    )


def ids(batches: Sequence[MicroBatch]) -> list[list[int]]:
    return [batch.responses.prompt_id_P.tolist() for batch in batches]


def responses(batches: Sequence[MicroBatch]) -> Iterator[tuple[list[int], Tensor]]:
    """(token ids, the reference's log-probabilities) of each response."""
    for batch in batches:
        groups = batch.responses
        for number in range(2 * groups.num_groups):
            here_N = groups.predicts_N == number
            yield batch.target_RT.flatten()[here_N].tolist(), groups.sampled_logprob_N[here_N]


@pytest.fixture
def computed(tmp_path: Path) -> PreferenceFeed:
    made = feed(tmp_path, CountingEngine())
    made.compute_reference("stage-1", ALL)
    return made


def test_every_pair_of_a_step_is_in_one_micro_batch(tmp_path: Path, computed: PreferenceFeed) -> None:
    """Five pairs over 2 ranks × 3 micro-batches: one of them is empty. In order, the sizes equal within one."""
    found = []
    for rank in range(2):
        share = feed(tmp_path, CountingEngine(), accumulation_steps=3, rank=rank, num_ranks=2)
        share.load_reference("stage-1", ALL)
        batches = share.train_batches([4, 6, 0, 3, 1])
        assert len(batches) == 3
        found += ids(batches)
    assert found == [[], [4], [6], [0], [3], [1]]


def test_held_out_pairs_come_in_batches_of_a_micro_batch(tmp_path: Path, computed: PreferenceFeed) -> None:
    assert computed.heldout_batches([]) == []
    assert ids(computed.heldout_batches([1, 2])) == [[1, 2]]
    found = []
    for rank in range(2):
        share = feed(tmp_path, CountingEngine(), rank=rank, num_ranks=2)  # three pairs in a micro-batch
        share.load_reference("stage-1", ALL)
        found.append(ids(share.heldout_batches(ALL)))
    assert found == [[[0], [1, 2]], [[3, 4], [5, 6]]]


def test_a_batch_holds_the_pair_and_what_the_reference_said(tmp_path: Path) -> None:
    engine = CountingEngine()
    made = feed(tmp_path, engine)
    made.compute_reference("stage-1", [5, 2, 4])
    [asked] = engine.batches
    rng = torch.Generator().manual_seed(3)
    said_N = -torch.rand(asked.target_RT.numel(), generator=rng)
    by_id = {pair.prompt_id: pair for pair in pairs()}
    found = list(responses(made.train_batches([4, 5])))
    wanted = [response for prompt_id in (4, 5) for response in (by_id[prompt_id].chosen, by_id[prompt_id].rejected)]
    assert [tokens for tokens, _ in found] == [response.token_ids.tolist() for response in wanted]
    assert len(wanted[1].token_ids) == 1, "end-of-text alone"
    for (_, logprob_T), number in zip(found, (4, 5, 0, 1), strict=True):  # of the response in the batch asked about
        assert torch.equal(logprob_T, said_N[asked.responses.predicts_N == number])
    with pytest.raises(KeyError):
        made.train_batches([3])


def test_the_file_gives_back_the_same(tmp_path: Path, computed: PreferenceFeed) -> None:
    engine = CountingEngine()
    resumed = feed(tmp_path, engine)
    resumed.load_reference("stage-1", list(reversed(ALL)))
    assert not engine.batches, "nothing is computed again"
    for one, other in zip(
        responses(resumed.train_batches(ALL)), responses(computed.train_batches(ALL)), strict=True
    ):
        assert one[0] == other[0] and torch.equal(one[1], other[1])
    assert [path.name for path in tmp_path.iterdir()] == ["stage-1.safetensors"]


def test_computing_again_replaces_the_file(tmp_path: Path, computed: PreferenceFeed) -> None:
    """A run that goes on from before the stage may have other weights there. What a crash left is in nobody's way."""
    before = (tmp_path / "stage-1.safetensors").read_bytes()
    (tmp_path / ".stage-1.safetensors.tmp").write_text("cut off")
    computed.compute_reference("stage-1", ALL)
    after = (tmp_path / "stage-1.safetensors").read_bytes()
    assert after != before and [path.name for path in tmp_path.iterdir()] == ["stage-1.safetensors"]


def test_a_file_that_is_not_what_was_written_is_refused(tmp_path: Path, computed: PreferenceFeed) -> None:
    path = tmp_path / "stage-1.safetensors"
    whole = path.read_bytes()

    def refused(problem: str, ids: Sequence[int] = ALL, members: Sequence[PreferencePair] | None = None) -> None:
        with pytest.raises(DataError, match=rf"stage-1.safetensors.*{problem}.*remove the checkpoints made since"):
            feed(tmp_path, CountingEngine(), members).load_reference("stage-1", ids)

    refused("of other pairs", ids=[0, 1])
    first, *others = pairs()
    swapped = replace(first, chosen=first.rejected, rejected=first.chosen)
    refused("of other pairs", members=[swapped, *others])
    longer = replace(first, prompt_token_ids=np.append(first.prompt_token_ids, first.prompt_token_ids))
    refused("of other pairs", members=[longer, *others])
    path.write_bytes(whole[:-2] + bytes([whole[-2] ^ 1]) + whole[-1:])
    refused("checksum")
    path.write_bytes(whole[: len(whole) // 2])
    refused("")
    path.unlink()
    refused("No such file")


def test_what_fails_on_one_rank_fails_on_all(tmp_path: Path, computed: PreferenceFeed) -> None:
    elsewhere = CountingEngine(other_ranks_fail=True)
    with pytest.raises(DataError, match="another rank"):
        feed(tmp_path, elsewhere).load_reference("stage-1", ALL)
    with pytest.raises(DataError, match="another rank"):
        feed(tmp_path, elsewhere, num_ranks=2, rank=1).compute_reference("stage-1", ALL)


def test_a_folder_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "reference").write_text("a file")
    with pytest.raises(DataError, match=r"stage-1.safetensors: .* cannot be written"):
        feed(tmp_path / "reference", CountingEngine()).compute_reference("stage-1", ALL)


def test_a_pair_longer_than_a_row_is_refused(tmp_path: Path) -> None:
    first, *others = pairs()
    long = replace(first, prompt_token_ids=np.ones(ROW, np.int32))
    with pytest.raises(DataError, match=r"prompt 0: .* 78 tokens, a row only 48: raise data.sequence_length"):
        feed(tmp_path, CountingEngine(), [long, *others])
