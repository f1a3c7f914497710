"""What goes into the slow reference and what comes out. Arrays of any float dtype are widened to float64."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np


# --- what goes in ----------------------------------------------------------------------------------------------
def _as_float64(record: object) -> None:
    for name, value in vars(record).items():
        if isinstance(value, np.ndarray | np.floating):
            setattr(record, name, value.astype(np.float64))
        elif isinstance(value, list) and value and isinstance(value[0], np.ndarray):
            setattr(record, name, [array.astype(np.float64) for array in value])


@dataclass
class RefResponse:
    token_ids: list[int]
    finished: bool  # the last token is end-of-text
    middle: np.ndarray  # [T, H]
    final: np.ndarray  # [T, H]
    logprob: np.ndarray  # [T], today's policy at temperature 1
    tempered_logprob: np.ndarray  # [T], today's policy at the sampling temperature
    behaviour_logprob: np.ndarray  # [T], the sampling policy at the sampling temperature
    entropy: np.ndarray  # [T], nats, temperature 1

    def __post_init__(self) -> None:
        _as_float64(self)


@dataclass
class RefGroup:
    prompt_middle: np.ndarray  # [N, H]
    responses: list[RefResponse]
    variants_middle: list[np.ndarray] = field(default_factory=list)  # [N, H] each: the prompt's other phrasings

    def __post_init__(self) -> None:
        _as_float64(self)


@dataclass
class RefParams:
    projection_DH: np.ndarray
    w_left_D: np.ndarray
    w_right_D: np.ndarray
    bias: float  # of the indicator
    verify_H: np.ndarray
    verify_bias: float
    principle_MD: np.ndarray
    principle_bias_M: np.ndarray
    principle_logit_M: np.ndarray
    meta_weight_3x5: np.ndarray
    meta_bias_3: np.ndarray

    def __post_init__(self) -> None:
        _as_float64(self)


@dataclass
class RefState:
    """Before the step."""

    step: int
    center_H: np.ndarray
    mean_reward_3: np.ndarray  # running means of R_logic, R_fact, R_behav
    mean_meta: float  # running mean of L_meta
    tau: float
    rho: float = 0.0  # ρ̄
    warming_up: bool = False  # β counts as 0
    share_history: list[np.ndarray] = field(default_factory=list)  # per step so far, [V]: see RefResult.token_share

    def __post_init__(self) -> None:
        _as_float64(self)


@dataclass
class RefConfig:
    """EvaluatorConfig and ObjectiveConfig, as far as they enter a step."""

    embedding: str = "learned"
    uncertainty_weight: float = 0.5
    omega_floor: float = 0.05
    principles: tuple[str, ...] = ("relevance", "non_repetition", "completeness", "fluency")
    token_weights: str = "informative"
    token_share_decay: float = 0.98
    vote_sharpness: float = 4.0
    substance: float = 0.05
    intrinsic: dict[str, float] = field(
        default_factory=lambda: {"self_consistency": 1.0, "coherence": 1.0, "quality": 1.0, "certainty": 0.0}
    )
    trust: str = "earned"
    trust_decay: float = 0.95
    warmup_rho: float = 0.3
    warmup_hold_steps: int = 20
    max_warmup_steps: int = 200
    alpha: float = 0.5
    beta: float = 0.4
    gamma: float = 0.1
    meta_loss: str = "centred"
    advantage: str = "group_norm"
    phi_self_align: str = "centred"
    importance: str = "token"
    importance_cap: float = 2.0
    embedding_loss_weight: float = 1.0
    indicator_loss_weight: float = 1.0
    principle_loss_weight: float = 1.0


@dataclass
class RefTables:
    claim_end: set[int]
    sentence_end: set[int]
    blank: set[int]
    eos_id: int
    vocab_size: int


# --- what comes out --------------------------------------------------------------------------------------------
@dataclass
class RefTerms:
    """One response."""

    logic: float = 0.0
    fact_score: float = 0.0
    uncertainty: float = 0.0
    fact: float = 0.0
    behaviour_scores: dict[str, float] = field(default_factory=dict)
    behav: float = 0.0
    self_consistency: float = 0.0
    coherence: float = 0.0
    signals: dict[str, float] = field(default_factory=dict)
    quality: float = 0.0
    certainty: float = 0.0
    substance: float = 0.0
    intrinsic: float = 0.0
    self_reward: float = 0.0
    used: float = 0.0  # R_used, of z-scores
    advantage: float = 0.0
    importance: np.ndarray = field(default_factory=lambda: np.zeros(0))  # w, [T]


@dataclass
class RefLosses:
    mle: float
    self_align_psi: float
    self_align_phi: float
    meta: float
    embedding: float
    indicator: float
    principles: float
    total: float


@dataclass
class RefResult:
    terms: list[list[RefTerms]]  # per group, per response
    omega: np.ndarray  # [3]
    correlations: dict[int, float]  # Spearman, by index of the valid groups
    rho: float  # ρ̄ after the step
    tau: float  # for the next step
    token_share: np.ndarray  # [V], share of this step's responses whose content has the token
    losses: RefLosses
