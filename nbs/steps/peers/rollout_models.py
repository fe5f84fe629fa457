"What the benchmarks of rollouts and of A/B tests share: models of a moment, and a test that peeks"

import numpy as np

from mlref.core import DAY, Predictor, TrainingSet, known_by
from mlref.recipes import fit_recipe


def fit_at(kind: str, every: TrainingSet, edge: int, seed: int) -> Predictor:
    "A model of what was known at an edge, stopped on its last two weeks"
    past = known_by(every.take(every.cutoff < edge), edge)
    stop = past.cutoff >= edge - 14 * DAY
    return fit_recipe(kind, past.take(~stop), past.take(stop), seed)


def count_peeking(differences: np.ndarray) -> int:
    "Rows in which a z-test says something at any look from the seventh on; a column a look"
    n = np.arange(1, differences.shape[1] + 1)
    mean = np.cumsum(differences, 1) / n
    variance = np.maximum(np.cumsum(differences**2, 1) / n - mean**2, 1e-18)
    said = np.abs(mean) > 1.959964 * np.sqrt(variance / np.maximum(n - 1, 1))
    return int(said[:, 6:].any(1).sum())
