"The model that every server of the benchmark serves, opened as each of them would open it"

import sys
from collections.abc import Callable

import numpy as np
import onnxruntime


def open_scorer(
    file: str,  # An ONNX file: float32 (rows, names) to one logit a row
) -> Callable[[np.ndarray], np.ndarray]:
    "Rows to probabilities, on one thread"
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.inter_op_num_threads = 1
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(file, options, providers=['CPUExecutionProvider'])

    def score(X: np.ndarray) -> np.ndarray:
        logits = np.asarray(session.run(None, {'X': X})[0], np.float64)
        return 1 / (1 + np.exp(-logits))

    return score


def arguments() -> tuple[str, int, list[str]]:
    "Model, port, and the words behind them"
    return sys.argv[1], int(sys.argv[2]), sys.argv[3:]
