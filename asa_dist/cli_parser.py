"""The words of the `asa` command, and what each may be. cli.py does what they say."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from asa_dist import __version__


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="asa", description="Train language models that align themselves.")
    parser.add_argument("--version", action="version", version=f"asa-dist {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    train = commands.add_parser("train", help="train on this machine", description="Train on this machine.")
    train.add_argument("config", type=Path, help="YAML file, e.g. configs/quickstart.yaml")
    _add_run_options(train)
    _add_profile(train)
    train.add_argument("--run-dir", type=Path, metavar="DIR", help="run folder (default: runs/CONFIG-DATE-TIME)")

    resume = commands.add_parser(
        "resume", help="go on with a run", description="Go on with a run from its newest checkpoint that is complete."
    )
    resume.add_argument("run_dir", type=Path, metavar="RUN", help="run folder")
    _add_run_options(resume)
    _add_profile(resume)

    _add_plan(commands)
    _add_udasa(commands)
    _add_submit(commands)

    inspect = commands.add_parser(
        "inspect", help="what a run has done and can go on from",
        description="Ledger totals, checkpoints with their verdicts, deaths and restarts of a run. Exit code 1 if "
        "prompts were lost or repeated, or if there are checkpoints and none of them can be used.",
    )  # fmt: skip
    inspect.add_argument("run_dir", type=Path, metavar="RUN", help="run folder")
    inspect.add_argument("--json", action="store_true", help="one JSON object instead of text")
    inspect.add_argument("--quick", action="store_true", help="check sizes of checkpoint files, not their checksums")
    _add_after_training(commands)

    doctor = commands.add_parser(
        "doctor", help="what this machine can and can't do",
        description="Looks at this machine and installation, tries what a run needs, says what to do. "
        "Exit code 1 if no run could start.",
    )  # fmt: skip
    doctor.add_argument("--json", action="store_true", help="one JSON object instead of text")
    return parser


def _add_plan(commands: Any) -> None:
    plan = commands.add_parser(
        "plan", help="will it fit, how fast will it be",
        description="Memory of a rank by part, operations and time of a step, publishing, the balance of trainers and "
        "rollout workers; by formula, for machines that are not here. Exit code 1 if it does not fit.",
    )  # fmt: skip
    plan.add_argument(
        "target", type=Path, metavar="CONFIG|RUN", help="YAML file, e.g. configs/asa-7b.yaml; or a run folder, whose "
        "report then shows the plan beside what was measured",
    )  # fmt: skip
    plan.add_argument("overrides", nargs="*", metavar="key.sub=value", help="override fields of the config")
    plan.add_argument("--machine", required=True, metavar="NAME", help="A100x8, H100x8, or this: measured now")
    plan.add_argument("--nodes", type=_bounded(1, 100_000), default=1, metavar="N", help="default: 1")
    plan.add_argument(
        "--rollout-nodes", type=_bounded(0, 100_000), default=0, metavar="M", help="so many of them only generate",
    )  # fmt: skip
    plan.add_argument("--json", action="store_true", help="one JSON object instead of text")


def _add_udasa(commands: Any) -> None:
    udasa = commands.add_parser(
        "udasa", help="one stage of a UDASA run", description="One stage of the first round that is not finished."
    )
    stages = udasa.add_subparsers(dest="stage", required=True, metavar="STAGE")
    for stage, what in (
        ("measure", "responses to every prompt, and how uncertain each is"),
        ("pairs", "preference pairs of what was measured"),
        ("train", "the curriculum of DPO on the pairs"),
    ):
        command = stages.add_parser(stage, help=what, description=f"{what[0].upper()}{what[1:]}.")
        command.add_argument("target", type=Path, metavar="CONFIG|RUN", help="YAML file: new run; run folder: goes on")
        _add_run_options(command)
        command.add_argument("--run-dir", type=Path, metavar="DIR", help="new run (default: runs/CONFIG-DATE-TIME)")
        if stage == "pairs":
            command.add_argument(
                "--show", type=_bounded(1, 2**31), metavar="K", help="print the K clearest and the K most doubtful"
            )


def _add_submit(commands: Any) -> None:
    submit = commands.add_parser(
        "submit", help="train as a SLURM job",
        description="Writes one script, RUN/submit.sbatch, and hands it to sbatch. The job restarts itself before the "
        "time limit and when a node is lost. In an existing run folder: goes on with that run.",
    )  # fmt: skip
    submit.add_argument("config", type=Path, help="YAML file, e.g. configs/asa-7b.yaml")
    submit.add_argument("overrides", nargs="*", metavar="key.sub=value", help="override fields of the config")
    submit.add_argument("--nodes", type=_bounded(1, 100_000), required=True, metavar="N", help="nodes of the job")
    submit.add_argument(
        "--rollout-nodes", type=_bounded(0, 100_000), default=0, metavar="M",
        help="so many of them only generate (default: 0, every node trains and generates)",
    )  # fmt: skip
    submit.add_argument(
        "--gpus-per-node", type=_bounded(0, 1000), default=0, metavar="G",
        help="all that a node has (default: 0, on CPUs with train.ranks per node)",
    )  # fmt: skip
    submit.add_argument("--time", metavar="T", help="time limit, as for sbatch: D-HH:MM:SS (default: the partition's)")
    submit.add_argument("--partition", metavar="P", help="as for sbatch")
    submit.add_argument("--account", metavar="A", help="as for sbatch")
    submit.add_argument(
        "--max-restarts", type=_bounded(0, 1000), default=3, metavar="K",
        help="restarts in a row without progress, after which the job fails (default: 3)",
    )  # fmt: skip
    submit.add_argument(
        "--run-dir", type=Path, metavar="DIR", help="run folder, shared by all nodes (default: runs/CONFIG-DATE-TIME)"
    )
    submit.add_argument("--dry-run", action="store_true", help="print who runs where; do nothing")


def _add_after_training(commands: Any) -> None:
    report = commands.add_parser(
        "report", help="a page to look at", description="Writes what a run did as one HTML page, curves and samples."
    )
    report.add_argument("run_dir", type=Path, metavar="RUN", help="run folder")
    report.add_argument("--out", type=Path, metavar="FILE", help="default: RUN/report.html")

    export = commands.add_parser(
        "export", help="a plain transformers folder",
        description="Writes a checkpoint as a folder that transformers loads, the evaluator heads beside it.",
    )  # fmt: skip
    export.add_argument("run_dir", type=Path, metavar="RUN", help="run folder")
    export.add_argument("out_dir", type=Path, metavar="DIR", help="new or empty folder")
    export.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32", help="default: float32")
    _add_step(export)

    evaluate = commands.add_parser(
        "eval", help="how good a checkpoint is",
        description="Held-out perplexity, samples with all reward terms, known answers, lm-eval tasks. Prints one JSON "
        "object and adds it to RUN/evals.jsonl.",
    )  # fmt: skip
    evaluate.add_argument("run_dir", type=Path, metavar="RUN", help="run folder")
    _add_step(evaluate)
    evaluate.add_argument(
        "--samples", type=_bounded(0, 2**31), default=64, metavar="N",
        help="responses to score, in whole groups (default: 64)",
    )  # fmt: skip
    evaluate.add_argument("--probes", type=Path, metavar="FILE", help="prompts with known answers, .jsonl")
    evaluate.add_argument(
        "--lm-eval", type=_names, default=[], metavar="TASKS", help="names, comma separated; needs lm-eval"
    )
    evaluate.add_argument("--lm-eval-include", type=Path, metavar="DIR", help="folder with YAMLs of more tasks")
    evaluate.add_argument("--seed", type=_bounded(0, 2**31), default=0, help="of all sampling (default: 0)")


def _bounded(least: int, above: int) -> Callable[[str], int]:
    """A whole number from ``least`` on, below ``above``."""

    def number(text: str) -> int:
        if not text.isdecimal() or not least <= int(text) < above:
            raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from {least} to {above - 1}")
        return int(text)

    return number


def _names(text: str) -> list[str]:
    if not all(names := [name.strip() for name in text.split(",")]):
        raise argparse.ArgumentTypeError(f"{text!r} is not a list of names, separated by commas")
    return names


def _add_step(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--step", type=_bounded(0, 2**31), metavar="N", help="checkpoint (default: the newest that is sound)"
    )


def _add_run_options(command: argparse.ArgumentParser) -> None:
    command.add_argument("overrides", nargs="*", metavar="key.sub=value", help="override fields of the config")
    command.add_argument("--ranks", type=int, metavar="N", help="trainer ranks (GPUs, if the config trains on GPUs)")
    command.add_argument(
        "--dry-run",
        action="store_true",
        help="print resolved config, parameter counts and process layout; start nothing",
    )


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Overrides may stand before and after the options; argparse by itself takes only the first batch of them."""
    parser = build_parser()
    options, rest = parser.parse_known_args(arguments)
    takes_overrides = "overrides" in options
    if unknown := [word for word in rest if not takes_overrides or word.startswith("-") or "=" not in word]:
        parser.error(f"unrecognized arguments: {' '.join(unknown)}")
    if takes_overrides:
        options.overrides += rest
    return options


def _add_profile(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--profile", metavar="A:B", help="method asa: record steps A to B as a trace: metrics.profile_steps=A:B",
    )  # fmt: skip
