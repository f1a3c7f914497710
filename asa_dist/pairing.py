"""UDASA's second stage: from what a round has measured to its files of pairs."""

from __future__ import annotations

import json
import shlex
from collections import Counter

import numpy as np

from asa_dist import __version__
from asa_dist.config import Config, ConfigError
from asa_dist.rounds import Round, paired_as
from asa_dist.runtime.measurements import MEASURED, MeasurementFiles
from asa_dist.runtime.pair_files import RoundPairs, write_pairs
from asa_dist.udasa.pairs import NO_PAIR_REASONS, assign_stages, make_pairs, stage_thresholds, summarize_pairs


def pair_round(found: Round, config: Config) -> RoundPairs:
    """Makes the pairs of what was measured, and writes them.

    Raises:
        ConfigError: no prompt gave a pair, or what was measured cannot be read.
        OSError: the files cannot be written.
    """
    try:
        files = MeasurementFiles(found.folder)
        files.check_complete()
        made = make_pairs(files.measured())
    except ValueError as error:
        raise ConfigError(
            f"{found.folder}: what was measured cannot be used: {error}. Remove damaged lines and {MEASURED}: "
            f"asa resume {shlex.quote(str(found.run_dir))} then measures what they held again"
        ) from None
    if not made.pairs:
        reasons = Counter(made.unpaired.values())
        listed = "; ".join(f"{count} because {NO_PAIR_REASONS[reason]}" for reason, count in reasons.items())
        way_on = "start a new run with other prompts, or a higher rollout.temperature"
        if found.index:
            way_on = f"the model before is whole: asa resume {found.run_dir} udasa.rounds={found.index} ends with it"
        raise ConfigError(
            f"{found.folder}: none of {len(made.unpaired)} prompts gave a pair, so there is nothing to train on: "
            f"{listed}; {way_on}"
        )
    curriculum = config.udasa.curriculum
    delta_P = np.array([pair.delta_u for pair in made.pairs])
    threshold_E = stage_thresholds(delta_P, curriculum.thresholds, curriculum.threshold_kind)
    stages = assign_stages(delta_P, threshold_E).tolist()
    round_pairs = RoundPairs(
        pairs=made.pairs,
        stage_by_id={pair.prompt_id: stage for pair, stage in zip(made.pairs, stages, strict=True)},
        round_index=found.index,
        summary=summarize_pairs(made, threshold_E),
        unpaired=made.unpaired,
        curriculum=paired_as(config),
    )
    write_pairs(found.folder, round_pairs, _provenance(config))
    return round_pairs


def _provenance(config: Config) -> dict[str, str]:
    """Where the pairs come from: what generated them, and how they were measured, as JSON."""
    measured = config.udasa.model_dump(mode="json", include={"sampling", "uncertainties", "fusion", "semantic",
                                                             "factual", "value"})  # fmt: skip
    del measured["value"]["url"]  # it may name a user
    sampling = config.rollout.model_dump(mode="json", include={
        "responses_per_prompt", "temperature", "top_p", "top_k", "min_p", "max_new_tokens"})  # fmt: skip
    return {"model": str(config.model.name_or_path), "prompt_file": str(config.rollout.prompt_file),
            "measured": json.dumps(measured), "sampling": json.dumps(sampling), "asa_dist": __version__}  # fmt: skip
