"The rows that both sides monitor, and how each side answers"

import json
import sys
import time
from pathlib import Path

import numpy as np
import polars as pl

FLOATS = tuple(f'number_{k}' for k in range(12))
CODES = ('code_0', 'code_1', 'code_2')
WORDS = ('word_0', 'word_1', 'word_2')
FEATURES = (*FLOATS, *CODES, *WORDS)


def make_rows(n: int, seed: int, moved: float = 0.0) -> pl.DataFrame:
    "Scores of float32 that are right, 12 features of floats, 3 of codes, 3 of words"
    random = np.random.default_rng(seed)
    p = random.beta(2, 6, n).astype(np.float32).astype(np.float64)
    columns = {'p': p, 'y': (random.random(n) < p * (1 - moved)).astype(np.float64)}
    for k, name in enumerate(FLOATS):
        values = random.gamma(1 + k, 1 + moved, n)
        values[random.random(n) < 0.01 * k] = np.nan
        columns[name] = values
    for k, name in enumerate(CODES):
        columns[name] = random.integers(0, 10 * (k + 1), n)
    for k, name in enumerate(WORDS):
        columns[name] = np.array([f'w{i}' for i in range(5 * (k + 1))])[
            random.integers(0, 5 * (k + 1), n)
        ]
    return pl.DataFrame(columns)


def write_chunks(folder: Path, rows: int, chunks: int) -> None:
    "A reference, and chunks that drift more and more"
    make_rows(50_000, 0).write_parquet(folder / 'reference.parquet')
    for k in range(chunks):
        chunk = make_rows(rows // chunks, k + 1, moved=0.2 * k / chunks)
        chunk.write_parquet(folder / f'chunk_{k:02}.parquet')


def peak_memory() -> float:
    "Megabytes that this process held at most; ru_maxrss would count the parent's too"
    status = Path('/proc/self/status').read_text()
    return int(status.split('VmHWM:')[1].split()[0]) / 1024


def answer(measure) -> None:
    "Measure once for each line that comes; seconds of the processor and of the wall, peak memory"
    print('{}', flush=True)
    for _ in sys.stdin:
        wall = time.perf_counter()
        cpu = time.process_time()
        try:
            table = measure()
            found = {'table': table}
        except Exception as error:  # what went wrong belongs into the answer
            found = {'error': repr(error)[:300]}
        found |= {'cpu': time.process_time() - cpu, 'wall': time.perf_counter() - wall}
        found['peak'] = peak_memory()
        print(json.dumps(found), flush=True)
