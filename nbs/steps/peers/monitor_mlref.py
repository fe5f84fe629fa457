"mlref's side: each chunk is counted, and the metrics come from the counts"

import sys
from pathlib import Path

import numpy as np
import polars as pl
from monitor_rows import FEATURES, answer

from mlref.count_metrics import fit_reference, metrics_table
from mlref.sketches import count_rows

folder = Path(sys.argv[1])
past = pl.read_parquet(folder / 'reference.parquet')
reference = fit_reference(past, np.arange(past.height) // 5_000, FEATURES)
del past
chunks = [pl.read_parquet(file) for file in sorted(folder.glob('chunk_*.parquet'))]


def measure():
    "Every metric of every chunk, as a list of day, metric, feature, value, alarm"
    days = {k: count_rows(chunk, reference.bins) for k, chunk in enumerate(chunks)}
    table = metrics_table(reference, days).with_columns(pl.col('day').to_physical())
    return table.select('day', 'metric', 'feature', 'value', 'alarm').rows()


answer(measure)
