"""Real models that say how uncertain a response is; what becomes of their answers is ``asa_dist.udasa``'s business.

Shapes: S texts or questions, B of them at once, T tokens, D embedding size, L labels, V vocabulary.
"""

from asa_dist.estimators.build import Estimators, build_estimators, check_estimators
from asa_dist.estimators.estimator import Encoder, EstimatorError, Judge, Notify, Question

__all__ = [
    "Encoder",
    "EstimatorError",
    "Estimators",
    "Judge",
    "Notify",
    "Question",
    "build_estimators",
    "check_estimators",
]
