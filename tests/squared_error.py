"""A task whose metric is no share and better downwards."""

from collections.abc import Sequence

import numpy as np

from qexp.tasks.base import Score
from qexp.tasks.restoration import Restoration


class SquaredError(Restoration):
    """The mean squared error of an image, in no unit."""

    metric, label, unit, higher_is_better = "mse", "MSE", "", False

    def score_of(self, evidence: Sequence[np.ndarray]) -> Score:
        errors = 10 ** (-np.concatenate(list(evidence)) / 10)
        spread = 2 * float(errors.std() / len(errors) ** 0.5)
        mean = float(errors.mean())
        return self.scored(mean, mean - spread, mean + spread, "two standard errors", len(errors))
