"""`asa eval`: one row of numbers about a checkpoint, appended to RUN/evals.jsonl.

    step, time                              of the checkpoint; when it was evaluated (UTC)
    eval/…, trust/tau, omega/…              as in metrics.jsonl; τ and ω are those of the next step
    samples/responses, reward/…, rollout/…  how many were sampled; as in metrics.jsonl, and every other term's mean
    signal/…, trust/rank_correlation        measured signals; of R_self with R_intrinsic, in these samples
    probes/…                                truth, greedy_truth, self_auc, intrinsic_auc, rho, …: see ``probes``
    lm_eval/TASK/METRIC                     see ``lm_eval``

A round of UDASA has no held-out rows, no rewards and no evaluator: of it there are the probes (truth, greedy_truth and
what else needs answers alone) and lm-eval.
"""

from __future__ import annotations

import fcntl
import math
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from asa_dist.asa.loop import LARGEST_EXPONENT
from asa_dist.asa.stepping import part_of
from asa_dist.config import ConfigError
from asa_dist.evaluation import probes as probing
from asa_dist.evaluation.checkpoint_model import AsaCheckpoint, CheckpointModel, default_device, open_checkpoint
from asa_dist.evaluation.export import omega, write_export
from asa_dist.evaluation.lm_eval import find_tasks, run_lm_eval
from asa_dist.evaluation.scoring import ScoredResponses, counts_of, sample_groups, score_responses
from asa_dist.records import RolloutGroup
from asa_dist.runtime.data.errors import DataError
from asa_dist.runtime.data.feed import CorpusFeed
from asa_dist.runtime.data.prompts import PromptStream
from asa_dist.runtime.model import AsaModel
from asa_dist.runtime.run_log import RunLog

if TYPE_CHECKING:
    from lm_eval.tasks import TaskManager

EVAL_LOG = "evals.jsonl"
NOT_SHOWN = {"advantage"}  # its mean is 0


def evaluate_run(
    run_dir: Path, *, step: int | None = None, num_samples: int = 64, probe_file: Path | None = None,
    lm_eval_tasks: Sequence[str] = (), lm_eval_include: Path | None = None, seed: int = 0,
    progress: Callable[[str], None] = lambda message: None,
) -> dict[str, Any]:
    """Evaluates the newest sound checkpoint, or that of ``step``, on one GPU if there is one, else on the CPU.

    If lm-eval fails, the rest of the row is appended all the same.

    Args:
        run_dir: of UDASA the folder of a round.
        num_samples: responses to the prompts that training takes next, in whole groups; 0: none. UDASA has no next
            ones, nor rewards to score them by: it is not looked at.
        probe_file: see ``probes``.
        lm_eval_tasks: names; ``lm_eval_include`` is a folder with YAMLs of more.
        seed: of all sampling. With the run's own, samples are those that the next training step draws (at
            max_policy_age 0).

    Returns:
        The row, as appended to ``evals.jsonl``; None: a value that was not finite.

    Raises:
        ConfigError: no run, checkpoint, probe file or task that can be used, or a row that cannot be written. Of UDASA
            also: neither probes nor tasks.
    """
    manager = find_tasks(lm_eval_tasks, lm_eval_include) if lm_eval_tasks else None
    probes = probing.read_probes(probe_file) if probe_file is not None else []
    checkpoint, device = open_checkpoint(run_dir, step, progress), default_device()
    if not (probes or manager or isinstance(checkpoint, AsaCheckpoint)):
        raise ConfigError(f"{run_dir}: a round of UDASA has no held-out rows and no rewards to evaluate: say what its "
                          "model is to be asked, with --probes or --lm-eval")  # fmt: skip
    with _writing(run_dir / EVAL_LOG) as path:  # that it can be, before the work
        path.open("a").close()
    row: dict[str, Any] = {"step": checkpoint.step, "time": datetime.now(UTC).isoformat(timespec="seconds")}
    try:
        progress(f"evaluating step {checkpoint.step} on the {'GPU' if device == 'cuda' else 'CPU'}")
        if isinstance(checkpoint, AsaCheckpoint):
            row |= _asa_row(checkpoint, num_samples, probes, seed, device, progress)
        elif probes:
            _, answers, _ = _answers(checkpoint, probes, seed, device, progress)
            row |= _named(answers)
    except DataError as error:
        raise ConfigError(str(error)) from None
    try:
        if manager is not None:
            row |= _lm_eval(checkpoint, lm_eval_tasks, manager, device, seed, progress)
    finally:
        row = {key: None if isinstance(value, float) and not math.isfinite(value) else value
               for key, value in row.items()}  # fmt: skip
        _append(path, row)
    return row


def _asa_row(
    checkpoint: AsaCheckpoint, num_samples: int, probes: Sequence[probing.Probe], seed: int, device: str,
    progress: Callable[[str], None],
) -> dict[str, float]:
    """What needs the whole model, which is let go of before lm-eval loads its own."""
    model = checkpoint.asa_model(device)
    row = heldout_perplexity(checkpoint, model) | _trust(checkpoint)
    if num_samples > 0:
        row |= _samples(checkpoint, model, num_samples, seed, progress)
    if probes:
        row |= _probes(checkpoint, model, probes, seed, progress)
    return row


@torch.no_grad()
def heldout_perplexity(checkpoint: AsaCheckpoint, model: AsaModel) -> dict[str, float]:
    """Of the rows that training evaluates on, beside that of the bigram model at the same step."""
    config, device = checkpoint.config, next(model.parameters()).device
    micro_batches = config.num_ranks * config.train.accumulation_steps  # of the size that a rank has memory for
    train = config.train.model_copy(update={"accumulation_steps": micro_batches})
    corpus = CorpusFeed(
        checkpoint.run_dir, config.data, train, config.seed, model.vocab_size, rank=0, num_ranks=1,
        sum_over_ranks=lambda values: values)  # fmt: skip
    corpus.load_state_dict(part_of(checkpoint.loop_state, "corpus"))
    batches = corpus.heldout_batches()
    inputs = checkpoint.step_inputs(counts_of(batches), str(device))
    loss = sum(float(model(batch.to(device), inputs).loss) for batch in batches)
    if not math.isfinite(loss):
        raise ConfigError(f"{checkpoint.run_dir}: the held-out loss at step {checkpoint.step} is {loss}: weights "
                          "without use; evaluate an older step")  # fmt: skip
    return {
        "eval/perplexity": math.exp(min(loss, LARGEST_EXPONENT)),
        "eval/bigram_perplexity": corpus.bigram_perplexity(),
    }


# --- parts of the row ---------------------------------------------------------------------------------------------
def _trust(checkpoint: AsaCheckpoint) -> dict[str, float]:
    weights = {f"omega/{term}": weight for term, weight in omega(checkpoint).items()}
    return {"trust/tau": checkpoint.alignment.tau, **weights}


def _samples(
    checkpoint: AsaCheckpoint, model: AsaModel, num_samples: int, seed: int, progress: Callable[[str], None]
) -> dict[str, float]:
    config, device = checkpoint.config, str(next(model.parameters()).device)
    stream = PromptStream(checkpoint.run_dir, config.data, config.rollout, config.seed)
    first = checkpoint.step * config.rollout.prompts_per_step
    num_groups = -(-num_samples // config.rollout.responses_per_prompt)
    prompts = [stream.prompt(first + number) for number in range(num_groups)]
    engine = checkpoint.rollout_engine(config.rollout, seed, device)
    groups = sample_groups(engine, prompts, config.groups_per_lease, progress)
    scored = score_responses(checkpoint, model, groups, progress)
    return {"samples/responses": scored.num_responses, **reward_means(scored)}


def reward_means(scored: ScoredResponses) -> dict[str, float]:
    """Under the names of metrics.jsonl, where it has them; of ``used`` the mean size, as there."""
    means: dict[str, float] = {}
    for name, value_PG in scored.terms.items():
        if name not in NOT_SHOWN:
            key = name if "/" in name else f"reward/{name}"
            means[key] = float((value_PG.abs() if name == "used" else value_PG).mean(dtype=torch.float64))
    sums = {name: float(value) for name, value in scored.sums.items() if value.numel() == 1}
    for name in ("length_mean", "distinct_fraction", "truncated_fraction", "empty_fraction"):
        means[f"rollout/{name}"] = sums[f"rollout/{name}"] / scored.num_responses
    means["rollout/entropy"] = sums["rollout/entropy"] / max(scored.num_tokens, 1)
    if sums["trust/valid_groups"]:
        means["trust/rank_correlation"] = sums["trust/rho_sum"] / sums["trust/valid_groups"]
    return means


def _probes(
    checkpoint: AsaCheckpoint, model: AsaModel, probes: Sequence[probing.Probe], seed: int,
    progress: Callable[[str], None],
) -> dict[str, float]:
    """What is said to them, and whether the evaluator knows when it is true."""
    device = str(next(model.parameters()).device)
    groups, answers, truth_PG = _answers(checkpoint, probes, seed, device, progress)
    terms = score_responses(checkpoint, model, groups, progress).terms
    found = answers | probing.alignment_metrics(terms["self"], truth_PG, seed)
    for term in ("self", "intrinsic"):
        agreed = probing.agreement(terms[term], truth_PG)
        found |= {f"{term}_{name}": value for name, value in agreed.items()}
    return _named(found)


def _answers(
    checkpoint: CheckpointModel, probes: Sequence[probing.Probe], seed: int, device: str,
    progress: Callable[[str], None],
) -> tuple[list[RolloutGroup], dict[str, float], np.ndarray]:
    """Groups of responses sampled at temperature 1, what is to be said of them and of greedy ones, truth_PG bool."""
    config, tokenizer = checkpoint.config, checkpoint.tokenizer()
    rollout = config.rollout
    num_phrasings = max(1 + len(probe.variants) for probe in probes)
    num_responses = max(rollout.responses_per_prompt, num_phrasings)
    room = config.data.sequence_length - rollout.max_new_tokens
    groups, scores = [], []
    for sampling in (probing.greedy_sampling(rollout, num_phrasings), probing.probe_sampling(rollout, num_responses)):
        engine = checkpoint.rollout_engine(sampling, seed, device)
        groups = probing.sample_probes(engine, probes, tokenizer, room, progress)
        scores.append(probing.score_probes(probes, groups, tokenizer))
    greedy, sampled = scores
    counted = {"greedy_truth": greedy.metrics["truth"], "responses": sampled.truth_PG.size}
    return groups, sampled.metrics | counted, sampled.truth_PG


def _named(found: dict[str, float]) -> dict[str, float]:
    return {f"probes/{name}": value for name, value in found.items()}


def _lm_eval(
    checkpoint: CheckpointModel, tasks: Sequence[str], manager: TaskManager, device: str, seed: int,
    progress: Callable[[str], None],
) -> dict[str, float]:
    dtype, run_dir = checkpoint.config.model.dtype, checkpoint.run_dir
    try:
        with tempfile.TemporaryDirectory(prefix=".eval-", dir=run_dir) as parent:  # where there is room
            folder = write_export(checkpoint, Path(parent) / "model", dtype, progress)
            progress(f"lm-eval: {', '.join(tasks)}")
            return run_lm_eval(folder, tasks, manager, dtype=dtype, device=device, seed=seed)
    except OSError as error:
        raise ConfigError(f"{run_dir}: lm-eval's copy of the model: {error.strerror or error}") from None


def _append(path: Path, row: dict[str, Any]) -> None:
    """Whole or not at all, also beside another `asa eval` of the same run."""
    with _writing(path), path.open("a") as turn:
        fcntl.flock(turn, fcntl.LOCK_EX)
        log = RunLog(path)
        try:
            if error := log.append(row) or log.sync():
                raise error
        finally:
            log.close()


@contextmanager
def _writing(path: Path) -> Iterator[Path]:
    try:
        yield path
    except OSError as error:
        raise ConfigError(f"{path}: the evaluation cannot be written: {error.strerror or error}") from None
