"Fits of growing tables, by one process, by two, and by two workers of Ray Train"

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import ray
from peers.outgrow_workers import Watch, marking

from mlref.core import TrainingSet
from mlref.distributed import TrainJob, train_distributed, write_job
from mlref.ext.ray_cluster import RayProcess
from mlref.ext.ray_train import train_on_ray
from mlref.training_state import TrainConfig

ALONE, TOGETHER, ON_RAY = 'one process', 'torchrun, two processes', 'Ray Train, two workers'
MADE = ('model', 'checkpoints', 'ray')  # by a fit, and taken away before the next


def newest_rows(
    table: TrainingSet,
    rows: int,
) -> TrainingSet:
    "The last rows of a table"
    return table.take(range(max(0, len(table) - rows), len(table)))


def write_jobs(
    folder: Path,
    past: TrainingSet,  # rows to learn from
    stop: TrainingSet,  # rows to stop on
    sizes: tuple[int, ...],  # rows of each fit
    epochs: int,
) -> dict[int, Path]:  # rows -> folder of the job
    "A job a size, all with the same rows to stop on"
    job = TrainJob(TrainConfig(epochs=epochs))
    tables = {rows: newest_rows(past, rows) for rows in sizes}
    return {
        rows: write_job(folder / f'job-{rows}', job, table, stop) for rows, table in tables.items()
    }


def fit_alone(folder: Path) -> None:
    script = Path(__file__).parent / 'outgrow_fit.py'
    _ = subprocess.run([sys.executable, str(script), str(folder)], check=True)


def measure_fit(
    fit: Callable[[Path], object],
    folder: Path,  # of its job
    rows: int,  # that one epoch learns from
    mark: str,  # of all its processes
) -> dict[str, float]:
    "Seconds from the call to the model and of the steps, CPU, memory, and the loss at the end"
    for name in MADE:
        shutil.rmtree(folder / name, ignore_errors=True)
    watch = Watch(mark)
    start = time.perf_counter()
    _ = fit(folder)
    whole = time.perf_counter() - start
    cpu = watch.stop()
    report = json.loads((folder / 'report.json').read_text())
    learnt = rows * len(report['history'])
    losses = [epoch['stop'] if isinstance(epoch, dict) else epoch for epoch in report['history']]
    return {
        'rate': learnt / whole,
        'steps_rate': learnt / report['seconds'],
        'p50': whole,
        'start': whole - report['seconds'],
        'cpu': cpu / learnt,
        'memory': watch.memory,
        'epochs': len(losses),
        'stop': min(losses),
    }


def fit_round(
    jobs: dict[int, Path],  # rows -> folder of the job
) -> tuple[dict[tuple[str, int], dict[str, float]], float]:  # side and rows -> what was measured
    "Every side once with every table, and seconds until Ray, which is there only for its own"
    found = {}
    with marking(f'{os.getpid()}-fit') as mark:
        for name, fit in {ALONE: fit_alone, TOGETHER: train_distributed}.items():
            for rows, folder in jobs.items():
                found[name, rows] = measure_fit(fit, folder, rows, mark)
        begun = time.perf_counter()
        with RayProcess() as cluster:
            seconds = time.perf_counter() - begun
            cluster.connect()
            for rows, folder in jobs.items():
                found[ON_RAY, rows] = measure_fit(train_on_ray, folder, rows, mark)
            ray.shutdown()
    return found, seconds
