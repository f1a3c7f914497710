"""A round's preference pairs, as files: written after measuring, read by every rank and by people. No torch here.

ROUND/pairs.parquet   one row per pair: both responses, their uncertainties, stage, where they come from
ROUND/pairs.json      counts, thresholds, histograms, who has no pair and why; written last: it makes the stage done

The same measurements give the same pairs, so what is damaged need not be repaired: it is made anew.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

from asa_dist.records import MeasuredResponse, PreferencePair
from asa_dist.runtime.checkpoint_files import FileRecord, sync_folder, verify_files, write_atomically, write_file
from asa_dist.runtime.data.errors import DataError
from asa_dist.udasa.pairs import Histogram, PairSummary

PAIRS, SUMMARY = "pairs.parquet", "pairs.json"
FORMAT = 1  # of both files
CHECKSUM = "xxh3_128"  # of what else the summary holds
SIDES = ("chosen", "rejected")


@dataclass(frozen=True)
class RoundPairs:
    """All that became of a round's prompts."""

    pairs: tuple[PreferencePair, ...]
    stage_by_id: dict[int, int]  # of every pair, by prompt id; 0 = clearest
    round_index: int  # from 0
    summary: PairSummary
    unpaired: dict[int, str]  # prompt id → key of NO_PAIR_REASONS, by ascending id
    curriculum: dict[str, Any]  # thresholds (a list) and threshold_kind, as configured


@dataclass(frozen=True)
class RoundSummary:
    """The same without the pairs themselves: what the summary file holds."""

    round_index: int
    summary: PairSummary
    unpaired: dict[int, str]
    curriculum: dict[str, Any]
    provenance: dict[str, str]  # model, config digest, version of asa_dist, …
    parquet: FileRecord  # what the file of pairs must be


# --- writing ----------------------------------------------------------------------------------------------------
def write_pairs(folder: Path, round_pairs: RoundPairs, provenance: Mapping[str, str]) -> None:
    """Replaces the pairs of the folder; durable on return. If it ends early, there are none, whatever was there before.

    Raises:
        KeyError: a pair without a stage.
        OSError: a file cannot be written.
    """
    rows = [_row_of(pair, round_pairs.stage_by_id[pair.prompt_id], round_pairs.round_index)
            for pair in round_pairs.pairs]
    (folder / SUMMARY).unlink(missing_ok=True)  # the old one does not describe the new pairs
    sync_folder(folder)
    record = _write_parquet(folder / PAIRS, rows, provenance)
    _write_summary(folder / SUMMARY, RoundSummary(
        round_pairs.round_index, round_pairs.summary, round_pairs.unpaired, round_pairs.curriculum, dict(provenance),
        record))


def _row_of(pair: PreferencePair, stage: int, round_index: int) -> dict[str, Any]:
    row = {
        "prompt_id": pair.prompt_id, "prompt": pair.prompt, "prompt_token_ids": pair.prompt_token_ids,
        "chosen_index": pair.chosen_index, "rejected_index": pair.rejected_index, "delta_u": pair.delta_u,
        "stage": stage + 1, "round": round_index + 1, "policy_version": pair.policy_version, "seed": pair.seed,
    }
    for side, response in zip(SIDES, (pair.chosen, pair.rejected), strict=True):
        row |= {f"{side}_{name}": value for name, value in vars(response).items()}
    return row


def _write_parquet(path: Path, rows: list[dict[str, Any]], provenance: Mapping[str, str]) -> FileRecord:
    """Appears whole, durable on return."""
    import pyarrow
    import pyarrow.parquet

    content = pyarrow.BufferOutputStream()
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows, _schema(provenance)), content)
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.unlink(missing_ok=True)
    record = write_file(temporary, [memoryview(content.getvalue())])
    temporary.replace(path)
    sync_folder(path.parent)
    return record


def _schema(provenance: Mapping[str, str]) -> Any:
    """The columns of the file, in their order; stage and round are counted from 1."""
    import pyarrow
    from pyarrow import bool_, float64, int32, int64, string

    token_ids = pyarrow.list_(int32())
    response = {
        "text": string(), "token_ids": token_ids, "finished": bool_(), "index": int32(),
        "u_semantic": float64(), "u_factual": float64(), "u_value": float64(), "u_total": float64(),
    }
    columns = {
        "prompt_id": int64(), "prompt": string(), "prompt_token_ids": token_ids,
        **{f"{side}_{name}": kind for side in SIDES for name, kind in response.items()},
        "delta_u": float64(), "stage": int32(), "round": int32(), "policy_version": int64(), "seed": int64(),
    }
    return pyarrow.schema(columns, dict(provenance))


def _write_summary(path: Path, made: RoundSummary) -> None:
    unpaired: dict[str, list[int]] = {}
    for prompt_id, reason in made.unpaired.items():
        unpaired.setdefault(reason, []).append(prompt_id)
    content = {
        "format": FORMAT, "round": made.round_index + 1, "summary": asdict(made.summary), "unpaired": unpaired,
        "curriculum": made.curriculum, "provenance": made.provenance, PAIRS: asdict(made.parquet),
    }
    text = json.dumps(content | {CHECKSUM: _digest(content)}, indent=1, ensure_ascii=False)
    write_atomically(path, f"{text}\n")


def _digest(content: Mapping[str, Any]) -> str:
    return xxhash.xxh3_128_hexdigest(json.dumps(content, sort_keys=True).encode())


# --- reading ----------------------------------------------------------------------------------------------------
def read_pairs(folder: Path) -> RoundPairs:
    """What :func:`write_pairs` wrote, bit for bit.

    Raises:
        DataError: there are no pairs, or a file is damaged or of another version; names it.
    """
    import pyarrow.parquet

    made = read_summary(folder)
    if problems := verify_files(folder, {PAIRS: made.parquet}):
        raise _unusable(folder, problems[0])
    with pyarrow.parquet.ParquetFile(folder / PAIRS) as file:
        rows = file.read().to_pylist()
    return RoundPairs(
        pairs=tuple(map(_pair_of, rows)),
        stage_by_id={row["prompt_id"]: row["stage"] - 1 for row in rows},
        round_index=made.round_index, summary=made.summary, unpaired=made.unpaired, curriculum=made.curriculum,
    )


def _pair_of(row: Mapping[str, Any]) -> PreferencePair:
    chosen, rejected = (_response_of(row, side) for side in SIDES)
    return PreferencePair(
        prompt_id=row["prompt_id"],
        prompt=row["prompt"],
        prompt_token_ids=np.array(row["prompt_token_ids"], np.int32),
        chosen=chosen,
        rejected=rejected,
        chosen_index=row["chosen_index"],
        rejected_index=row["rejected_index"],
        delta_u=row["delta_u"],
        policy_version=row["policy_version"],
        seed=row["seed"],
    )


def _response_of(row: Mapping[str, Any], side: str) -> MeasuredResponse:
    def value(name: str) -> Any:
        return row[f"{side}_{name}"]

    return MeasuredResponse(
        value("text"), np.array(value("token_ids"), np.int32), value("finished"),
        value("u_semantic"), value("u_factual"), value("u_value"), value("u_total"))


def read_summary(folder: Path) -> RoundSummary:
    """The summary file alone: the file of pairs is not looked at.

    Raises:
        DataError: there are no pairs, or the file is damaged or of another version; names it.
    """
    try:
        content = json.loads((folder / SUMMARY).read_bytes())
        if content.pop(CHECKSUM) != _digest(content):
            raise _unusable(folder, f"{SUMMARY}: its checksum does not match: bytes were changed")
        if content["format"] != FORMAT:
            found = content["format"]
            raise _unusable(folder, f"{SUMMARY}: written by another version of asa_dist: format {found}, not {FORMAT}")
        return _summary_of(content)
    except FileNotFoundError:
        raise DataError(f"{folder}: {SUMMARY}: missing: the pairs of this round have not been made, or not "
                        "completely; `asa udasa pairs` makes them") from None
    except OSError as error:
        raise DataError(f"{folder}: {SUMMARY}: cannot be read: {error.strerror}") from None
    except (ValueError, TypeError, KeyError, AttributeError):
        raise _unusable(folder, f"{SUMMARY}: no summary of pairs, or cut off") from None


def _summary_of(content: Mapping[str, Any]) -> RoundSummary:
    summary = content["summary"]
    histograms = {name: Histogram(tuple(histogram["edges"]), tuple(histogram["counts"]))
                  for name, histogram in summary["histograms"].items()}
    return RoundSummary(
        round_index=content["round"] - 1,
        summary=PairSummary(summary["num_prompts"], summary["num_unpaired"], tuple(summary["thresholds"]),
                            tuple(summary["stage_pairs"]), histograms),
        unpaired=dict(sorted((prompt_id, reason) for reason, ids in content["unpaired"].items() for prompt_id in ids)),
        curriculum=content["curriculum"],
        provenance=content["provenance"],
        parquet=FileRecord(**content[PAIRS]),
    )


def _unusable(folder: Path, problem: str) -> DataError:
    return DataError(f"{folder}: {problem}. Remove {SUMMARY}: `asa udasa pairs` makes the pairs anew, and the same "
                     "ones, from what was measured")
