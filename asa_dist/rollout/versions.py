"""Which weights can be served: versions grow shard by shard, the newest complete one is what workers load.

    offer (rank 0) ─┐
    offer (rank 1) ─┴─► complete: the LoadOrder of all workers ──reject──► forgotten: a Republish for every rank
                           │                                                              │
                           └──────────── a newer complete version replaces both ◄─────────┘

Plain bookkeeping without waiting; the coordinator is its only caller.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from asa_dist.records import ShardRecord, WeightManifest
from asa_dist.rollout.engine import NO_VERSION


@dataclass(frozen=True)
class LoadOrder:
    """To a worker: load this version, then ask again."""

    manifest: WeightManifest
    shard_refs: tuple[Any, ...]  # object references of the shards, in rank order


@dataclass(frozen=True)
class Republish:
    """To a trainer rank: this version arrived corrupt; offer your shard of it again, then ask again.

    A rank that no longer holds it ignores this: it has offered, or is offering, a newer one.
    """

    version: int
    reason: str  # what the worker found


@dataclass
class _PartialVersion:
    """A version of which some ranks' shards have arrived."""

    contents: WeightManifest  # without shards: what all ranks must agree on
    num_ranks: int
    shards: dict[int, tuple[ShardRecord, Any]] = field(default_factory=dict)  # by rank


class Versions:
    """Holds the shard references of the newest complete version, and of the incomplete ones after it."""

    def __init__(self) -> None:
        self.newest = NO_VERSION
        self._order: LoadOrder | None = None  # of the newest version
        self._ordered_to: set[str] = set()  # workers that were given this order
        self._partial: dict[int, _PartialVersion] = {}  # by version
        self._rejections: tuple[int, int] = (NO_VERSION, 0)  # (version, how often) of the last rejected one
        self._republish: Republish | None = None
        self._ranks_to_ask: set[int] = set()  # that have not been given the Republish

    def offer(self, part: WeightManifest, num_ranks: int, shard_refs: Sequence[Any]) -> bool:
        """One rank's shard; True if it completes the version. Offering again, or too late, changes nothing.

        Raises:
            ValueError: the ranks disagree about what the version contains.
        """
        (record,), (ref,) = part.shards, shard_refs
        if part.version <= self.newest:
            return False
        contents = replace(part, shards=())
        partial = self._partial.setdefault(part.version, _PartialVersion(contents, num_ranks))
        if (contents, num_ranks) != (partial.contents, partial.num_ranks):
            raise ValueError(f"version {part.version}: rank {record.rank} of {num_ranks} published other tensors, "
                             f"shapes or dtype than ranks {sorted(partial.shards)} of {partial.num_ranks}")
        partial.shards[record.rank] = (record, ref)
        if len(partial.shards) < num_ranks:
            return False
        records, refs = zip(*(partial.shards[rank] for rank in range(num_ranks)), strict=True)
        self.newest, self._order = part.version, LoadOrder(replace(contents, shards=records), refs)
        self._ordered_to = set()
        self._partial = {version: p for version, p in self._partial.items() if version > part.version}
        self._republish, self._ranks_to_ask = None, set()
        return True

    def order_for(self, worker_id: str, served_version: int) -> LoadOrder | None:
        """What a worker must load before anything else; None if it serves the newest complete version."""
        if self._order is None or served_version >= self.newest:
            return None
        self._ordered_to.add(worker_id)
        return self._order

    def reject(self, worker_id: str, version: int, reason: str) -> int:
        """Forgets the newest version if its shards, as this worker got them, are corrupt.

        Returns:
            How often this version has been forgotten; 0 = nothing changed, since another version is the newest by
            now, or the worker speaks of shards that have been replaced.
        """
        if self._order is None or version != self.newest or worker_id not in self._ordered_to:
            return 0
        rejected, times = self._rejections
        self._rejections = (version, times + 1 if rejected == version else 1)
        self._republish, self._ranks_to_ask = Republish(version, reason), set(range(len(self._order.shard_refs)))
        self.newest, self._order = NO_VERSION, None
        return self._rejections[1]

    def republish_for(self, rank: int) -> Republish | None:
        """What a rank must offer again; told once."""
        if rank not in self._ranks_to_ask:
            return None
        self._ranks_to_ask.remove(rank)
        return self._republish

    def describe(self) -> str:
        partial = ", ".join(f"{version} has shards of ranks {sorted(p.shards)} of {p.num_ranks}"
                            for version, p in self._partial.items())
        corrupt = f"; version {self._republish.version} arrived corrupt" if self._republish else ""
        return (f"newest complete version {self.newest if self.newest != NO_VERSION else 'none'}; "
                f"incomplete versions: {partial or 'none'}{corrupt}")
