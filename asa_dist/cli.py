"""The `asa` command. Imports nothing heavy: `asa --help` answers at once, a wrong config fails within seconds.

At its top stands nothing that could be missing or broken: `asa doctor` has to answer then, too.
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from asa_dist.cli_parser import parse_arguments
from asa_dist.runtime.stopping import EXIT_BAD_CONFIG, EXIT_FAILED, EXIT_INTERRUPTED

if TYPE_CHECKING:
    from asa_dist.config import Config
    from asa_dist.rounds import Stage


def _overrides(options: argparse.Namespace, path: Path) -> list[str]:
    """Those of the command line; `--ranks` and `--profile` are some, too. ``path``: the config they are for."""
    from asa_dist.config_text import read_tree

    overrides = list(options.overrides)
    if options.ranks is not None:
        train = read_tree(path, overrides).get("train")
        trains_on_gpus = isinstance(train, dict) and bool(train.get("gpus"))
        overrides.append(f"train.{'gpus' if trains_on_gpus else 'ranks'}={options.ranks}")
    if getattr(options, "profile", None) is not None:
        overrides.append(f"metrics.profile_steps={options.profile}")
    return overrides


def train_command(options: argparse.Namespace) -> int:
    from asa_dist.config import load_config

    config = load_config(options.config, _overrides(options, options.config))
    return _run(config, _new_run_dir(options, options.config), str(options.config), options, resume=False)


def _new_run_dir(options: argparse.Namespace, config: Path) -> Path:
    return options.run_dir or Path("runs") / f"{config.stem}-{time.strftime('%Y%m%d-%H%M%S')}"


def resume_command(options: argparse.Namespace) -> int:
    from asa_dist.config_text import read_tree
    from asa_dist.resume import config_path, latest_step, load_run_config

    run_dir = options.run_dir
    path = config_path(run_dir)
    if read_tree(path).get("method") == "udasa":
        return _resume_udasa(run_dir, options)
    config = load_run_config(run_dir, _overrides(options, path))
    num_steps = config.train.steps
    step = latest_step(run_dir, num_steps)
    if step is None:
        print("there is no checkpoint yet: starting from the beginning", flush=True)
    elif step < num_steps:
        print(f"going on after step {step} of {num_steps}", flush=True)
    else:
        longer = f"asa resume {shlex.quote(str(run_dir))} train.steps=…"
        print(f"{run_dir} has finished: step {step} of train.steps = {num_steps}; to go on longer: {longer}")
        return 0
    return _run(config, run_dir, str(path), options, resume=True)


def _resume_udasa(run_dir: Path, options: argparse.Namespace, *stages: Stage) -> int:
    from asa_dist.config import ConfigError
    from asa_dist.config_text import read_tree
    from asa_dist.resume import config_path, load_run_config
    from asa_dist.rounds import is_round
    from asa_dist.udasa_run import changeable

    path = config_path(run_dir)
    if (method := read_tree(path).get("method")) != "udasa":
        raise ConfigError(f"{path}: method = {method!r}: asa udasa is for method udasa")
    if is_round(run_dir):
        run = shlex.quote(str(run_dir.parent))
        raise ConfigError(f"{run_dir} is one round of a run: what goes on is the run: asa resume {run}")
    config = load_run_config(run_dir, _overrides(options, path), changeable(run_dir))
    return _run(config, run_dir, str(path), options, resume=True, stages=stages)


def udasa_command(options: argparse.Namespace) -> int:
    from asa_dist.config import ConfigError, load_config

    target, count = options.target, getattr(options, "show", None)
    if target.is_dir():
        if count and not (options.overrides or options.dry_run) and _show_pairs(target, count):
            return 0  # whoever works on the run
        code = _resume_udasa(target, options, options.stage)
    else:
        config = load_config(target, _overrides(options, target))
        if config.method != "udasa":
            raise ConfigError(f"{target}: method = {config.method!r}: asa udasa is for method udasa")
        target = _new_run_dir(options, target)
        code = _run(config, target, str(options.target), options, resume=False, stages=(options.stage,))
    if code == 0 and count and not options.dry_run:
        _show_pairs(target, count)
    return code


def _show_pairs(run_dir: Path, count: int) -> bool:
    """Of the newest round; False: it has none yet."""
    from asa_dist.config import ConfigError
    from asa_dist.rounds import newest_round
    from asa_dist.runtime.data.errors import DataError
    from asa_dist.runtime.pair_files import SUMMARY, read_pairs
    from asa_dist.udasa.pair_text import show_pairs

    try:
        made = read_pairs(newest_round(run_dir, SUMMARY))
    except (ConfigError, DataError):
        return False
    print(show_pairs(made.pairs, made.stage_by_id, count))
    return True


def plan_command(options: argparse.Namespace) -> int:
    from asa_dist.config import load_config
    from asa_dist.plan.planning import plan
    from asa_dist.plan.report import as_json, as_text, keep_plan

    path = options.target
    if is_run := path.is_dir():
        from asa_dist.resume import config_path  # heavier than planning

        path = config_path(path)
    config = load_config(path, options.overrides)
    planned = plan(config, options.machine, options.nodes, options.rollout_nodes)
    if is_run and not options.overrides:  # else it is not the run that was planned
        keep_plan(planned, options.target)
    print(as_json(planned) if options.json else as_text(planned))
    return 0 if planned.fits else EXIT_FAILED


def submit_command(options: argparse.Namespace) -> int:
    from asa_dist import submit
    from asa_dist.config import load_config
    from asa_dist.job_layout import plan_layout

    path = options.config
    request = submit.JobRequest(options.time, options.partition, options.account, options.max_restarts)
    asked = load_config(path, options.overrides)
    layout = plan_layout(asked, str(path), options.nodes, options.rollout_nodes, options.gpus_per_node)
    config = submit.resolve_config(path, options.overrides, layout)
    run_dir = _new_run_dir(options, path).absolute()
    script = submit.render_script(config, layout, request, path.stem, run_dir)
    print(submit.describe_job(config, layout, request, run_dir))
    if options.dry_run:
        print(submit.settings_of(script))
        return 0
    try:
        job = submit.submit_job(submit.save_job(config, script, run_dir))
    except submit.SubmitError as error:
        print(f"asa: {error}", file=sys.stderr)
        return EXIT_FAILED
    print(submit.what_next(job, run_dir))
    return 0


def _run(
    config: Config, run_dir: Path, origin: str, options: argparse.Namespace, *, resume: bool,
    stages: Sequence[Stage] = (),
) -> int:
    """
    Args:
        origin: the config's name in messages.
        stages: of UDASA, only these; none = all.
    """
    from asa_dist.config import ConfigError, dump_config

    method: Any
    if config.method == "udasa":
        from asa_dist import udasa_run as method
    else:
        from asa_dist import launcher as method
    chosen = {"stages": stages} if stages else {}
    gpus = None if options.dry_run else method.assign_gpus(config, origin, **chosen)
    from asa_dist.rollout.cluster import ClusterError  # seconds, from here on
    from asa_dist.runtime.data.errors import DataError
    from asa_dist.runtime.model import ModelError

    try:
        if gpus is None:
            print(f"{dump_config(config)}\n{method.describe(config)}")
            return 0
        return method.run_training(config, run_dir, gpus, resume=resume, started_at=options.started_at, **chosen)
    except (DataError, ModelError) as error:
        raise ConfigError(str(error)) from None
    except ClusterError as error:
        print(f"asa: {error}", file=sys.stderr)
        return EXIT_FAILED


@contextmanager
def _progress() -> Iterator[Callable[[str], None]]:
    """What is being done, on a line of its own that goes away; nothing if stderr is no terminal."""

    def show(message: str) -> None:
        if sys.stderr.isatty():
            print(f"\r{message}\x1b[K", end="", file=sys.stderr, flush=True)

    try:
        yield show
    finally:
        show("")


def inspect_command(options: argparse.Namespace) -> int:
    from asa_dist.inspection import as_json, as_text, inspect_run
    from asa_dist.rounds import newest_round

    with _progress() as show:
        folder = newest_round(options.run_dir)
        found = inspect_run(folder, is_quick=options.quick, progress=lambda name: show(f"checking {name}"))
    print(as_json(found) if options.json else as_text(found))
    return 0 if found.is_sound else EXIT_FAILED


def report_command(options: argparse.Namespace) -> int:
    from asa_dist.report import write_report
    from asa_dist.rounds import newest_round

    print(write_report(newest_round(options.run_dir), options.out))
    return 0


def export_command(options: argparse.Namespace) -> int:
    from asa_dist.evaluation.export import export_run
    from asa_dist.rounds import newest_round
    from asa_dist.runtime.checkpoint_files import FOLDER as CHECKPOINTS

    with _progress() as show:
        run_dir = newest_round(options.run_dir, CHECKPOINTS)
        folder = export_run(run_dir, options.out_dir, options.dtype, options.step, show)
    print(folder)
    return 0


def eval_command(options: argparse.Namespace) -> int:
    from asa_dist.config import ConfigError
    from asa_dist.evaluation.evaluate import evaluate_run
    from asa_dist.rounds import newest_round
    from asa_dist.runtime.checkpoint_files import FOLDER as CHECKPOINTS

    if options.lm_eval_include is not None and not options.lm_eval:
        raise ConfigError("--lm-eval-include says where tasks are, but --lm-eval names none")
    with _progress() as show:
        row = evaluate_run(
            newest_round(options.run_dir, CHECKPOINTS), step=options.step, num_samples=options.samples,
            probe_file=options.probes,
            lm_eval_tasks=options.lm_eval, lm_eval_include=options.lm_eval_include, seed=options.seed, progress=show,
        )  # fmt: skip
    print(json.dumps(row, indent=1, ensure_ascii=False, allow_nan=False))
    return 0


def doctor_command(options: argparse.Namespace) -> int:
    from asa_dist.doctor import as_json, as_text, diagnose, every_run_can_start

    with _progress() as show:
        findings = diagnose(show)
    print(as_json(findings) if options.json else as_text(findings))
    return 0 if every_run_can_start(findings) else EXIT_FAILED


COMMANDS: dict[str, Callable[[argparse.Namespace], int]] = {
    "train": train_command,
    "resume": resume_command,
    "plan": plan_command,
    "udasa": udasa_command,
    "submit": submit_command,
    "inspect": inspect_command,
    "report": report_command,
    "export": export_command,
    "eval": eval_command,
    "doctor": doctor_command,
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit code: 0 finished, or stopped as asked; 1 failed; 2 the config or its content cannot be used; 75 ended
    early, start again with `asa resume`; 76 another start owns the run; 128 + n stopped at once by signal n."""
    options = parse_arguments(arguments)
    options.started_at = time.time()
    if options.command == "doctor":  # imports nothing that could be broken
        return doctor_command(options)
    from asa_dist.config_text import ConfigError

    try:
        return COMMANDS[options.command](options)
    except ConfigError as error:
        print(f"asa: {error}", file=sys.stderr)
        return EXIT_BAD_CONFIG
    except KeyboardInterrupt:
        return EXIT_INTERRUPTED


if __name__ == "__main__":
    sys.exit(main())
