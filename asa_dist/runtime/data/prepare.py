"""Everything about data that is done, and checked, once, before any rank starts.

Run folder afterwards::

    tokenizer/                  a plain transformers tokenizer folder
    data/source_0/ source_1/ …  tokenised documents with their held-out marks (streaming source: held-out ones only)
    data/prompts/               the tokenised prompt file, if there is one
    data/summary.json           DataSummary; data/ exists only when complete
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import shutil
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from asa_dist.config import DataConfig, RolloutConfig
from asa_dist.runtime.data.corpus import SourceSummary, check_sources, make_tokenizer, write_prompts, write_source
from asa_dist.runtime.data.errors import DataError


@dataclass(frozen=True)
class DataSummary:
    """What was prepared; also the mark of completeness in the run folder. Tokens include end-of-text."""

    documents: int
    tokens: int
    corpus_hash: str  # blake2b-128 over the documents read, in order, hexadecimal
    python_version: str  # the python_docs source depends on it
    vocab_size: int
    eos_id: int
    fingerprint: str  # blake2b-128 of ``settings``
    settings: dict[str, Any] = field(repr=False)  # config that data and order depend on, by dotted key
    sources: list[SourceSummary] = field(repr=False)


def prepare(
    data: DataConfig, rollout: RolloutConfig, seed: int, run_dir: Path, progress: Callable[[str], None],
) -> DataSummary:
    """Reads, tokenises and checks everything; a second call with the same settings only reads the summary.

    Work happens in ``run_dir/.prepare`` and becomes visible by renames, ``data/`` last: a crash leaves nothing that
    looks complete. One call at a time per run folder.

    Raises:
        DataError: content that cannot be used, or a run folder that was prepared with other settings.
    """
    settings = _settings(data, rollout, seed)
    if (run_dir / "data").exists():
        return _reopen(run_dir, settings)
    work = run_dir / ".prepare"
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True)
    try:
        summary = _build(data, rollout, settings, work, progress)
        _publish(work, run_dir)
    finally:
        shutil.rmtree(work, ignore_errors=True)
    return summary


def _build(
    data: DataConfig, rollout: RolloutConfig, settings: dict[str, Any], work: Path, progress: Callable[[str], None],
) -> DataSummary:
    tokenizer = make_tokenizer(data, progress)
    tokenizer.save_pretrained(work / "tokenizer")
    corpus_hash = hashlib.blake2b(digest_size=16)
    sources = []
    for index in range(len(data.sources)):
        source = write_source(tokenizer, data, rollout, index, work / "data" / f"source_{index}", corpus_hash)
        progress(f"{source.source}: {source.train_documents:,} training documents, {source.train_tokens:,} tokens; "
                 f"held out: {source.heldout_documents:,} documents, {source.heldout_tokens:,} tokens")
        sources.append(source)
    check_sources(sources, data, rollout)
    if rollout.prompt_file is not None:
        num_prompts = write_prompts(tokenizer, rollout, work / "data" / "prompts")
        progress(f"{rollout.prompt_file}: {num_prompts:,} prompts")
    summary = DataSummary(
        documents=sum(source.train_documents + source.heldout_documents for source in sources),
        tokens=sum(source.train_tokens + source.heldout_tokens for source in sources),
        corpus_hash=corpus_hash.hexdigest(), python_version=platform.python_version(), vocab_size=len(tokenizer),
        eos_id=tokenizer.eos_token_id, fingerprint=_fingerprint(settings), settings=settings, sources=sources)
    (work / "data" / "summary.json").write_text(json.dumps(asdict(summary), indent=1) + "\n", encoding="utf-8")
    return summary


# --- settings and publishing -------------------------------------------------------------------------------------
def _settings(data: DataConfig, rollout: RolloutConfig, seed: int) -> dict[str, Any]:
    prompts = rollout.model_dump(
        mode="json", include={"prompt_file", "prompt_variants", "min_prompt_tokens", "max_prompt_tokens"})
    return dict(_leaves({"seed": seed, "data": data.model_dump(mode="json"), "rollout": prompts}, ""))


def _leaves(tree: Any, key: str) -> Iterator[tuple[str, Any]]:
    """The values of a tree of dictionaries and lists, by dotted key."""
    if not isinstance(tree, dict | list):
        yield key, tree
        return
    children: Iterable[tuple[Any, Any]] = tree.items() if isinstance(tree, dict) else enumerate(tree)
    for part, value in children:
        yield from _leaves(value, f"{key}.{part}" if key else part)


def _fingerprint(settings: dict[str, Any]) -> str:
    return hashlib.blake2b(json.dumps(settings, sort_keys=True).encode(), digest_size=16).hexdigest()


def _reopen(run_dir: Path, settings: dict[str, Any]) -> DataSummary:
    path = run_dir / "data" / "summary.json"
    try:
        tree = json.loads(path.read_text(encoding="utf-8"))
        tree["sources"] = [SourceSummary(**source) for source in tree["sources"]]
        summary = DataSummary(**tree)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(f"{path}: cannot be read ({error}); delete {run_dir / 'data'} to prepare it again") from None
    before = summary.settings
    if summary.fingerprint != _fingerprint(settings):
        changed = "; ".join(f"{key}: {before.get(key)!r} then, {settings.get(key)!r} now"
                            for key in sorted(before.keys() | settings.keys()) if before.get(key) != settings.get(key))
        raise DataError(f"{run_dir}: this run folder was prepared for other data ({changed}); "
                        "use the same settings again, or another run folder")
    return summary


def _publish(work: Path, run_dir: Path) -> None:
    for path in sorted(work.rglob("*")):
        if path.is_file():
            with path.open("rb") as file:
                os.fsync(file.fileno())
    shutil.rmtree(run_dir / "tokenizer", ignore_errors=True)  # of a call that ended between the two renames
    os.rename(work / "tokenizer", run_dir / "tokenizer")
    os.rename(work / "data", run_dir / "data")
