"""asa plan: counts against the real model, figures by hand, what fits, and what it says to do if nothing does."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import pytest

from asa_dist.cli import main
from asa_dist.config import Config, ConfigError, load_config
from asa_dist.plan import flops
from asa_dist.plan.calibration import can_rehearse
from asa_dist.plan.machine import ASSUMED, MACHINES, Machine
from asa_dist.plan.memory import model_states, rank_memory, worker_memory
from asa_dist.plan.planning import as_overrides, changed, place, plan, plan_on
from asa_dist.plan.report import as_json, as_text
from asa_dist.plan.shape import Trunk, count_parameters, trunk_of, work_of
from asa_dist.plan.step_time import collective_seconds, rollout_seconds, step_time
from asa_dist.runtime.stopping import EXIT_BAD_CONFIG

CONFIGS = Path(__file__).parents[2] / "configs"
LARGE, SMALL = CONFIGS / "asa-7b.yaml", CONFIGS / "quickstart.yaml"
H100 = MACHINES["H100x8"]
SMALL_HOST = dataclasses.replace(H100, host_bytes=100e9)


def config_of(path: Path, *overrides: str) -> Config:
    return load_config(path, list(overrides))


def with_memory(num_bytes: float) -> Machine:
    return dataclasses.replace(H100, device_bytes=num_bytes)


@pytest.mark.parametrize("overrides", [
    [], ["model.architecture.tie_word_embeddings=false", "model.architecture.num_key_value_heads=2"],
    ["evaluator.embedding=raw", "objective.embedding_loss_weight=0", "evaluator.principles=[fluency]"]])  # fmt: skip
def test_parameters_are_those_of_the_model_that_is_built(overrides: list[str]) -> None:
    from asa_dist.launcher import count_model

    config = config_of(SMALL, *overrides)
    assert count_parameters(config) == count_model(config)


def test_flops_by_hand() -> None:
    trunk = Trunk(
        num_layers=2, hidden_size=4, intermediate_size=8, query_size=4, key_size=2, vocab_size=10, is_tied=True
    )
    weights = 2 * (2 * 4 * 4 + 2 * 4 * 2 + 3 * 4 * 8)
    assert trunk.block_weights == weights
    assert flops.blocks(trunk, 3, 5) == 3 * 2 * weights + 2 * 3 * (2 * 2 * 4 * 5)  # q·k and p·v, both 2·m·Q
    assert flops.head(trunk, 3) == 2 * 3 * 4 * 10
    once = flops.blocks(trunk, 6, 3)
    assert flops.train(trunk, 2, 3, 6) == 3 * once + 4 * flops.head(trunk, 6)
    assert flops.train(trunk, 2, 3, 6, is_recomputed=True) == 4 * once + 4 * flops.head(trunk, 6)


def test_flops_are_about_six_per_parameter_and_token() -> None:
    config = config_of(LARGE)
    trunk = trunk_of(config)
    of_a_token = flops.train(trunk, 1, 2048, 2048) / 2048
    assert of_a_token / trunk.num_parameters == pytest.approx(6, rel=0.15)


def test_states_of_zero_3_are_18_bytes_per_parameter_over_the_ranks() -> None:
    config = changed(config_of(LARGE), {"train.gpus": 8, "train.accumulation_steps": 4})
    states = sum(model_states(config).values())
    assert states == pytest.approx(18 * sum(count_parameters(config).values()) / 8)
    assert 13.5 < states / 2**30 < 14.5


def test_checkpointing_and_smaller_chunks_save_memory() -> None:
    usual, kept = (rank_memory(config_of(LARGE, *extra), H100).device for extra in (
        [], ["model.activation_checkpointing=false"]))
    assert kept["activations"] > 5 * usual["activations"]
    assert rank_memory(config_of(LARGE, "model.logprob_chunk_tokens=256"), H100).device["logits"] < usual["logits"]


def test_offload_moves_states_to_the_host() -> None:
    here, there = (rank_memory(config_of(LARGE, f"train.offload_optimizer={offload}"), H100)
                   for offload in ("false", "true"))
    assert here.model_state_bytes == there.model_state_bytes
    assert there.device_bytes < here.device_bytes and there.host_bytes > here.host_bytes


def test_the_work_of_a_micro_batch() -> None:
    work = work_of(config_of(LARGE, "train.accumulation_steps=8"))  # 4 ranks: 128 rows and 32 groups of 8 over 32
    assert (work.corpus_rows, work.rollout_rows) == (4, 1)  # 8 responses of 192 tokens in rows of 2048
    assert work.scored_tokens == 4 * 2048 + 8 * 128
    assert work.answers_per_worker == work.answers_at_a_time == 32 * 8 / 4


def test_collectives_follow_the_alpha_beta_model() -> None:
    config = config_of(LARGE)
    free_hops = dataclasses.replace(H100, assumptions=ASSUMED | {"hop_seconds": 0.0})
    seconds = collective_seconds(config, free_hops, trunk_of(config), work_of(config), 1)
    num_parameters = sum(count_parameters(config).values())
    moved = 2 * (3 * num_parameters - 10**9)  # in bfloat16; of the second all-gather DeepSpeed keeps so many
    assert seconds == pytest.approx(8 * moved * 3 / 4 / (450e9 * 0.8))  # 8 micro-batches, 4 ranks, one node
    assert collective_seconds(config, H100, trunk_of(config), work_of(config), 1) > seconds


def test_rollouts_wait_for_nothing_but_age_zero() -> None:
    late, at_once = (step_time(config_of(LARGE, f"rollout.max_policy_age={age}"), H100) for age in (1, 0))
    assert late.step == max(late.training, late.rollouts)
    assert at_once.step == at_once.training + at_once.rollouts
    assert at_once.waiting == pytest.approx(at_once.rollouts)


def test_four_ranks_of_each_of_two_nodes_talk_over_the_network() -> None:
    placed = place(config_of(LARGE, "rollout.workers=8"), H100, 2, 0)
    assert (placed.layout.ranks_per_node, placed.work.num_ranks) == (4, 8), "as many as one node has GPUs"
    of_one, of_two = (collective_seconds(placed.config, H100, trunk_of(placed.config), placed.work, num_nodes)
                      for num_nodes in (1, 2))  # fmt: skip
    assert of_two > of_one and placed.time.exposed_collectives + placed.time.hidden_collectives == of_two


def test_engine_hf_has_one_lease_at_a_time() -> None:
    config = config_of(LARGE, "rollout.workers=1", "rollout.groups_per_lease=8")  # 32 groups
    work, trunk = work_of(config), trunk_of(config)
    assert (work.leases_per_worker, work.answers_at_a_time) == (4, 8 * 8)
    whole = work_of(config_of(LARGE, "rollout.workers=1"))
    cache = [worker_memory(one, H100)["key/value cache"] for one in (config, config_of(LARGE, "rollout.workers=1"))]
    assert cache[1] == pytest.approx(4 * cache[0])
    assert rollout_seconds(config, H100, trunk, work) > 2 * rollout_seconds(config, H100, trunk, whole)
    assert work_of(config_of(LARGE, "rollout.workers=1", "rollout.groups_per_lease=8",
                             "rollout.engine=vllm")).leases_per_worker == 1


def test_decoding_reads_all_weights_for_every_token() -> None:
    config = config_of(LARGE, "rollout.engine=vllm")
    trunk = trunk_of(config)
    seconds = rollout_seconds(config, H100, trunk, work_of(config))
    assert seconds > 128 * 2 * trunk.num_parameters / (3.35e12 * 0.6)
    assert seconds < rollout_seconds(config_of(LARGE), H100, trunk, work_of(config)), "engine hf is slower"


# --- plans -------------------------------------------------------------------------------------------------------
def test_the_7b_config_on_eight_nodes() -> None:
    made = plan(config_of(LARGE), "H100x8", 8)
    assert made.fits and made.chosen.work.num_ranks == 56 and made.chosen.layout.num_ranks == 56
    assert 0.5 < made.chosen.time.training < 3
    assert made.better is not None and made.better.tokens_per_second > made.chosen.tokens_per_second


def test_nodes_that_only_generate() -> None:
    made = plan(config_of(LARGE), "H100x8", 2, 1)
    assert (made.chosen.layout.num_ranks, made.chosen.config.rollout.workers) == (8, 8)


def test_what_it_says_to_do_is_enough() -> None:
    config = config_of(LARGE, "model.activation_checkpointing=false")
    machine = with_memory(40e9)
    made = plan_on(config, machine, 1, 0)
    assert not made.fits and "does not fit" in made.problems[0] and "GiB" in made.problems[0]
    assert made.problems[-1].startswith("do this: ")
    overrides = made.problems[-1].removeprefix("do this: ").split()
    assert plan_on(config_of(LARGE, "model.activation_checkpointing=false", *overrides), machine, 1, 0).fits


@pytest.mark.parametrize(("engine", "key"), [("hf", "rollout.groups_per_lease"), ("vllm", "rollout.gpus_per_worker")])
def test_a_worker_that_does_not_fit(engine: str, key: str) -> None:
    asked = ["rollout.workers=1", "rollout.max_new_tokens=1024", f"rollout.engine={engine}"]
    problem, advice = plan_on(config_of(LARGE, *asked), H100, 2, 0).problems
    assert problem.endswith("for a device of a rollout worker") and key in advice
    overrides = advice.removeprefix("do this: ").split()
    assert plan_on(config_of(LARGE, *asked, *overrides), H100, 2, 0).fits


@pytest.mark.parametrize("num_nodes", [1, 4])
def test_vllm_on_shared_gpus_has_what_ranks_leave(num_nodes: int) -> None:
    asked = ["rollout.placement=shared", "rollout.max_policy_age=0", "rollout.engine=vllm"]
    problem, advice = plan_on(config_of(LARGE, *asked), H100, num_nodes, 0).problems
    assert problem.endswith("for a GPU that both share") and "rollout.gpu_memory_fraction=0." in advice
    overrides = advice.removeprefix("do this: ").split()
    assert plan_on(config_of(LARGE, *asked, *overrides), H100, num_nodes, 0).fits


def test_more_nodes_where_no_setting_helps() -> None:
    made = plan_on(config_of(LARGE, "train.offload_optimizer=true", "train.accumulation_steps=8"), SMALL_HOST, 1, 0)
    assert not made.fits and "all ranks of a host" in made.problems[0]
    assert made.problems[-1].startswith("do this: --nodes 2, ")


def test_a_machine_too_small_for_anything() -> None:
    made = plan_on(config_of(LARGE), with_memory(5e9), 1, 0)
    assert made.problems[-1].startswith("nothing that asa plan can change")


@pytest.mark.parametrize(("machine", "nodes", "rollout_nodes", "message"), [
    ("H100", 1, 0, "there are A100x8, H100x8, this"), ("H100x8", 1, 1, "none trains"),
    ("this", 2, 0, "nothing about a network")])  # fmt: skip
def test_what_cannot_be_planned(machine: str, nodes: int, rollout_nodes: int, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        plan(config_of(LARGE), machine, nodes, rollout_nodes)


def test_sizes_that_the_config_does_not_say() -> None:
    config = config_of(LARGE, "data.tokenizer.train=null", "data.tokenizer.path=somewhere")
    with pytest.raises(ConfigError, match="Write the model's sizes"):
        plan(config, "H100x8", 8)


def test_the_settings_it_prints_are_overrides() -> None:
    made = plan(config_of(LARGE), "H100x8", 8)
    printed = as_overrides(made.chosen.settings).split()
    assert config_of(LARGE, *printed) == made.chosen.config


def test_text_and_json() -> None:
    made = plan(config_of(LARGE), "H100x8", 8)
    text, tree = as_text(made), json.loads(as_json(made))
    assert text.startswith("fits: ") and "ASSUMED" in text and "training_efficiency 0.4" in text
    assert tree["fits"] is True and tree["chosen"]["seconds"]["step"] == made.chosen.time.step
    assert sum(tree["chosen"]["bytes_per_rank"].values()) == made.chosen.memory.device_bytes
    short = plan_on(config_of(LARGE), with_memory(5e9), 1, 0)
    assert as_text(short).startswith("does not fit: ") and json.loads(as_json(short))["fits"] is False


def test_a_plan_imports_nothing_heavy() -> None:
    code = ("import sys; from pathlib import Path; from asa_dist.config import load_config; from asa_dist.plan import "
            "planning, report; report.as_text(planning.plan(load_config(Path(sys.argv[1]), []), 'H100x8', 8)); "
            "sys.exit(', '.join({'torch', 'transformers', 'ray', 'deepspeed'} & set(sys.modules)) or 0)")
    run = subprocess.run([sys.executable, "-c", code, str(LARGE)], capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr


# --- this machine ------------------------------------------------------------------------------------------------
LAYER = {"layer_compute_seconds": 0.1, "other_compute_seconds": 0.2, "layer_collective_seconds": 0.01,
         "other_collective_seconds": 0.02, "layer_rollout_seconds": 0.05, "other_rollout_seconds": 0.1}  # fmt: skip


def rehearsed(cores: float, **changes: float) -> Machine:
    return Machine("this", 2, False, {"float32": 1e11}, 8e9, 1e10, 1e9, 1e9, 1e10, 24e9, "made up",
                   ASSUMED | {"copy_bandwidth_share": 1.0}, {"cores": cores, **LAYER, **changes})  # fmt: skip


def test_what_was_rehearsed_grows_with_every_layer() -> None:
    config = config_of(SMALL, "rollout.max_policy_age=0")  # 4 layers
    time = step_time(config, rehearsed(3))
    assert (time.compute, time.exposed_collectives, time.rollouts) == pytest.approx((0.6, 0.06, 0.3))
    assert time.step == pytest.approx(0.96 + time.publish) and time.waiting == pytest.approx(0.3)
    deeper = step_time(config_of(SMALL, "model.architecture.num_layers=9", "rollout.max_policy_age=0"), rehearsed(3))
    assert deeper.compute - time.compute == pytest.approx(5 * 0.1)


@pytest.mark.parametrize(("cores", "step"), [(3, 0.66), (2, 0.66 + 0.3 / 2), (1, 2 * 0.66 + 0.3)])
def test_ranks_and_workers_share_the_cores_that_there_are(cores: int, step: float) -> None:
    time = step_time(config_of(SMALL), rehearsed(cores))  # two ranks and a worker, at the same time
    assert time.step == pytest.approx(step, abs=0.002) and time.waiting == 0


def test_more_workers_than_cores_take_turns() -> None:
    alone, crowd = (step_time(config_of(SMALL, "rollout.max_policy_age=0", f"rollout.workers={workers}"), rehearsed(2))
                    for workers in (2, 4))  # fmt: skip
    assert crowd.rollouts == pytest.approx(2 * alone.rollouts)


def test_only_what_is_small_enough_is_rehearsed() -> None:
    machine = dataclasses.replace(rehearsed(2), measured={"op_seconds": 1e-6})
    assert can_rehearse(config_of(SMALL), machine)
    assert not can_rehearse(config_of(SMALL), dataclasses.replace(machine, device_bytes=1e9))
    assert not can_rehearse(config_of(SMALL), dataclasses.replace(machine, peak_flops={"float32": 1e6}))
    assert not can_rehearse(config_of(SMALL, "rollout.engine=vllm"), machine)


def test_gloo_that_does_not_work_is_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("asa_dist.plan.gloo.INTERFACE", "none")
    assert main(["plan", str(SMALL), "--machine", "this"]) == EXIT_BAD_CONFIG
    said = capsys.readouterr().err
    assert said.startswith("asa: --machine this: gloo between two processes: ") and said.count("\n") == 1


@pytest.mark.distributed
@pytest.mark.slow
def test_this_machine_is_measured() -> None:
    made = plan(config_of(SMALL), "this")
    measured = made.machine.measured
    assert measured["matmul_flops"] > 1e6 and measured["gloo_bytes_per_second"] > 1e5
    assert made.machine.is_rehearsed and measured["layer_compute_seconds"] > 0
    assert "measured: cores" in as_text(made) and "rehearsal" in as_text(made) and "ASSUMED" not in as_text(made)
