"""One function: config, machine, nodes → Plan; and what to change if it does not fit."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from asa_dist.config import Config, ConfigError, build_config
from asa_dist.job_layout import JobLayout, plan_layout
from asa_dist.plan.calibration import this_machine
from asa_dist.plan.machine import MACHINES, Machine
from asa_dist.plan.memory import Memory, kept_bytes, rank_memory, worker_memory
from asa_dist.plan.shape import Work, count_parameters, work_of
from asa_dist.plan.step_time import StepTime, step_time

THIS = "this"
MACHINE_NAMES = (*MACHINES, THIS)
MOST_NODES = 1024  # that are tried for a model that does not fit on fewer
WORTHWHILE = 1.05  # tokens per second, of what the nodes as they are give

Settings = dict[str, Any]  # "section.field" → value


@dataclass(frozen=True)
class Placement:
    """One way to use the nodes.

    Attributes:
        settings: what differs from the config that was asked for, for so many ranks and workers to be legal.
    """

    config: Config
    layout: JobLayout
    settings: Settings
    memory: Memory
    worker: dict[str, float]
    time: StepTime
    work: Work

    @property
    def tokens_per_second(self) -> float:
        """Corpus and response tokens, all ranks."""
        return self.work.scored_tokens_per_step / self.time.step


@dataclass(frozen=True)
class Plan:
    """
    Attributes:
        problems: why it does not fit, and what would; empty if it fits.
        better: how the same nodes would train on clearly more tokens per second; None: no way is known.
    """

    machine: Machine
    chosen: Placement
    parameters: dict[str, int]
    problems: tuple[str, ...]
    better: Placement | None

    @property
    def fits(self) -> bool:
        return not self.problems


def plan(config: Config, machine_name: str, num_nodes: int = 1, num_rollout_nodes: int = 0) -> Plan:
    """
    Args:
        machine_name: one of MACHINE_NAMES; ``this`` measures this machine first, for some seconds.

    Raises:
        ConfigError: no such machine; a config that cannot be planned, or not on so many nodes.
    """
    if config.method != "asa":
        raise ConfigError(f"method = {config.method!r}: asa plan is for method asa")
    if machine_name not in MACHINE_NAMES:
        raise ConfigError(f"--machine {machine_name}: there are {', '.join(MACHINE_NAMES)}")
    if num_rollout_nodes < 0 or num_nodes <= num_rollout_nodes:
        raise ConfigError(f"--rollout-nodes {num_rollout_nodes} of --nodes {num_nodes} only generate: none trains")
    if machine_name == THIS and num_nodes > 1:
        raise ConfigError(f"--machine this --nodes {num_nodes}: what is measured here says nothing about a network")
    if machine_name == THIS and (config.train.gpus or config.rollout.gpus_per_worker):
        raise ConfigError("--machine this measures CPUs; the config asks for GPUs: name a machine that has some, or "
                          "plan with train.gpus=0 rollout.gpus_per_worker=0")
    machine = this_machine(config) if machine_name == THIS else MACHINES[machine_name]
    return plan_on(config, machine, num_nodes, num_rollout_nodes)


def plan_on(config: Config, machine: Machine, num_nodes: int, num_rollout_nodes: int) -> Plan:
    """As :func:`plan`, on a machine that is known."""
    chosen = place(config, machine, num_nodes, num_rollout_nodes)
    problems = tuple(_problems(config, chosen, machine))
    better = None if problems else _better(config, machine, chosen)
    return Plan(machine, chosen, count_parameters(config), problems, better)


# --- a config on so many nodes -----------------------------------------------------------------------------------
def place(config: Config, machine: Machine, num_nodes: int, num_rollout_nodes: int, **changes: Any) -> Placement:
    """
    Args:
        changes: settings, with ``__`` for the dot.

    Raises:
        ConfigError: not on so many nodes.
    """
    wanted = {key.replace("__", "."): value for key, value in changes.items()}
    if not machine.has_gpus:
        fitted, settings = changed(config, wanted), wanted
        layout = plan_layout(fitted, "the plan", num_nodes, num_rollout_nodes)
    else:
        asked = _unchecked(config, wanted)  # it may be legal only with the number of ranks that is still to be found
        asked = _unchecked(asked, _workers(asked, machine, num_nodes, num_rollout_nodes))
        layout = plan_layout(asked, "the plan", num_nodes, num_rollout_nodes, machine.num_devices)
        settings = wanted | _settings(asked, layout)
        settings = {key: value for key, value in settings.items() if value != setting(config, key)}
        fitted = changed(config, settings)
    return Placement(fitted, layout, settings, rank_memory(fitted, machine), worker_memory(fitted, machine),
                     step_time(fitted, machine, layout.num_trainer_nodes), work_of(fitted))  # fmt: skip


def _workers(config: Config, machine: Machine, num_nodes: int, num_rollout_nodes: int) -> Settings:
    """Of nodes that only generate as many as have room; else as many as asked for, equally many on every node."""
    gpus = config.rollout.gpus_per_worker or 1
    if num_rollout_nodes:
        workers = num_rollout_nodes * max(1, machine.num_devices // gpus)
    else:
        workers = num_nodes * -(-config.rollout.workers // num_nodes)
    return {"rollout.workers": workers, "rollout.gpus_per_worker": gpus}


def _settings(config: Config, layout: JobLayout) -> Settings:
    """The batch that was asked for, rounded up to a multiple of the ranks."""
    rollout, train = config.rollout, config.train
    smallest = min(rollout.prompts_per_step, train.corpus_rows_per_step)
    accumulation = max(1, min(train.accumulation_steps, smallest // layout.num_ranks))
    batches = layout.num_ranks * accumulation
    prompts = batches * -(-rollout.prompts_per_step // batches)
    workers = min(rollout.workers, prompts)
    settings = {
        "train.gpus": layout.num_ranks, "train.accumulation_steps": accumulation,
        "train.corpus_rows_per_step": batches * -(-train.corpus_rows_per_step // batches),
        "rollout.prompts_per_step": prompts, "rollout.workers": workers,
        "rollout.gpus_per_worker": rollout.gpus_per_worker, "rollout.groups_per_lease": rollout.groups_per_lease,
    }  # fmt: skip
    if prompts % (rollout.groups_per_lease or workers):
        share = -(-prompts // workers)  # at most this many, so that every worker gets some
        settings["rollout.groups_per_lease"] = max(n for n in range(1, share + 1) if prompts % n == 0)
    return settings


def setting(config: Config, key: str) -> Any:
    section, name = key.split(".")
    return getattr(getattr(config, section), name)


def changed(config: Config, settings: Mapping[str, Any]) -> Config:
    """The config with other values, checked as if they stood in its file. Raises ConfigError."""
    return build_config(_unchecked(config, settings).model_dump(), "the plan") if settings else config


def _unchecked(config: Config, settings: Mapping[str, Any]) -> Config:
    for key, value in settings.items():
        section, name = key.split(".")
        config = config.model_copy(update={section: getattr(config, section).model_copy(update={name: value})})
    return config


# --- fitting -----------------------------------------------------------------------------------------------------
def fits(placement: Placement, machine: Machine) -> bool:
    return not list(shortages(placement, machine))


def shortages(placement: Placement, machine: Machine) -> Iterator[tuple[str, float, float]]:
    """(whose, bytes needed, bytes there are)."""
    config, worker, room = placement.config, sum(placement.worker.values()), _worker_room(placement.config, machine)
    per_node = placement.layout.ranks_per_node * placement.memory.host_bytes
    needs = [
        ("a rank", placement.memory.device_bytes, machine.device_bytes),
        ("a device of a rollout worker", worker, room),
        ("all ranks of a host", per_node, machine.host_bytes),
    ]
    if config.rollout.placement == "shared" and machine.has_gpus:
        taken = room if config.rollout.engine == "vllm" else worker  # vLLM takes its share, needed or not
        kept = kept_bytes(config, placement.memory)
        needs.append(("a GPU that both share", taken + kept, machine.device_bytes))
    yield from (need for need in needs if need[1] > need[2])


def _worker_room(config: Config, machine: Machine) -> float:
    """Bytes of a device that a rollout worker may use."""
    is_vllm = config.rollout.engine == "vllm" and machine.has_gpus
    return machine.device_bytes * (config.rollout.gpu_memory_fraction if is_vllm else 1.0)


def _problems(config: Config, chosen: Placement, machine: Machine) -> Iterator[str]:
    short = list(shortages(chosen, machine))
    for whose, needed, there in short:
        yield f"does not fit: {gib(needed)} of {gib(there)} for {whose}"
    if short:
        yield _advice(config, chosen, machine)


def gib(num_bytes: float) -> str:
    return f"{num_bytes / 2**30:,.1f} GiB"


def _advice(config: Config, chosen: Placement, machine: Machine) -> str:
    """The fewest changes, in the order of what they cost in speed, that make it fit."""
    layout, changes = chosen.layout, _smaller_worker(chosen.config, machine)
    for remedy in ({}, *_remedies(chosen, machine)):
        try:
            tried = place(config, machine, layout.num_nodes, layout.num_rollout_nodes, **changes | remedy)
        except ConfigError:
            continue
        changes |= remedy
        if fits(tried, machine):
            return "do this: " + as_overrides(tried.settings)
    for num_nodes in _more_nodes(layout.num_nodes) if machine.has_gpus else ():
        try:
            tried = place(config, machine, num_nodes, layout.num_rollout_nodes, **changes)
        except ConfigError:
            continue
        if fits(tried, machine):
            return f"do this: --nodes {num_nodes}, {as_overrides(tried.settings)}"
    return "nothing that asa plan can change makes it fit: a smaller model, shorter rows, or larger devices"


def _smaller_worker(config: Config, machine: Machine) -> Settings:
    """Settings with ``__`` for the dot, with which a rollout worker fits its devices; none if it does already."""
    for settings in ({}, *_ways_to_generate(config, machine)):
        smaller = _unchecked(config, {key.replace("__", "."): value for key, value in settings.items()})
        if sum(worker_memory(smaller, machine).values()) <= _worker_room(smaller, machine):
            return settings
    return {}


def _ways_to_generate(config: Config, machine: Machine) -> Iterator[Settings]:
    """Fewer groups at a time; then the model over several GPUs of a node, which engine vllm alone can."""
    rollout, gpus = config.rollout, config.rollout.gpus_per_worker
    if rollout.engine != "vllm":
        most = rollout.groups_per_lease or max(1, rollout.prompts_per_step // rollout.workers)
        for groups in range(most - 1, 0, -1):
            if rollout.prompts_per_step % groups == 0:
                yield {"rollout__groups_per_lease": groups}
    while machine.has_gpus and (gpus := 2 * max(1, gpus)) <= machine.num_devices:
        yield {"rollout__gpus_per_worker": gpus, "rollout__engine": "vllm"}


def _remedies(chosen: Placement, machine: Machine) -> Iterator[Settings]:
    """Settings with ``__`` for the dot; each comes beside those before it."""
    config = chosen.config
    if config.rollout.placement == "shared" and config.rollout.engine == "vllm":
        room = 1 - kept_bytes(config, chosen.memory) / machine.device_bytes
        if 0.05 <= room < config.rollout.gpu_memory_fraction:
            yield {"rollout__gpu_memory_fraction": int(20 * room) / 20}
    if config.train.zero_stage < 3:
        yield {"train__zero_stage": 3}
    smallest = min(config.rollout.prompts_per_step, config.train.corpus_rows_per_step)
    accumulation = config.train.accumulation_steps
    while (accumulation := 2 * accumulation) * config.num_ranks <= smallest:
        yield {"train__accumulation_steps": accumulation}
    if not config.model.activation_checkpointing:
        yield {"model__activation_checkpointing": True}
    if config.model.logprob_chunk_tokens > 256:
        yield {"model__logprob_chunk_tokens": 256}
    if not config.train.offload_optimizer:
        yield {"train__offload_optimizer": True}


def _more_nodes(num_nodes: int) -> Iterator[int]:
    while (num_nodes := 2 * num_nodes) <= MOST_NODES:
        yield num_nodes


def as_overrides(settings: Mapping[str, Any]) -> str:
    return " ".join(f"{key}={str(value).lower() if isinstance(value, bool) else value}"
                    for key, value in settings.items())  # fmt: skip


# --- balance of trainers and generators --------------------------------------------------------------------------
def _better(config: Config, machine: Machine, chosen: Placement) -> Placement | None:
    """How the same nodes train on most tokens per second, if it pays."""
    if not machine.has_gpus:
        return None
    best = chosen
    for num_rollout_nodes, changes in _divisions(config, machine, chosen.layout.num_nodes):
        try:
            tried = place(config, machine, chosen.layout.num_nodes, num_rollout_nodes, **changes)
        except ConfigError:
            continue
        if fits(tried, machine) and tried.tokens_per_second > best.tokens_per_second:
            best = tried
    return best if best.tokens_per_second > WORTHWHILE * chosen.tokens_per_second else None


def _divisions(config: Config, machine: Machine, num_nodes: int) -> Iterator[tuple[int, Settings]]:
    """(nodes that only generate, settings): every division of the GPUs, with the engine as it is and with vLLM."""
    is_shared = config.rollout.placement == "shared"
    for engine in dict.fromkeys((config.rollout.engine, "vllm")):
        for num_rollout_nodes in range(1 if is_shared else num_nodes):
            workers_per_node = range(1, machine.num_devices) if num_rollout_nodes == 0 and not is_shared else (None,)
            for workers in workers_per_node:
                changes: Settings = {} if workers is None else {"rollout__workers": workers * num_nodes}
                yield num_rollout_nodes, changes | {"rollout__engine": engine}
