"NannyML's side: the rows are in memory when it is asked"

import os
import sys
import warnings
from pathlib import Path

os.environ['NML_DISABLE_USAGE_LOGGING'] = '1'
warnings.simplefilter('ignore')

import nannyml
import pandas as pd
from monitor_rows import CODES, FEATURES, WORDS, answer

folder = Path(sys.argv[1])
past = pd.read_parquet(folder / 'reference.parquet')
files = sorted(folder.glob('chunk_*.parquet'))
rows = pd.concat([pd.read_parquet(file) for file in files], ignore_index=True)
for frame in (past, rows):
    frame['predicted'] = (frame['p'] > 0.5).astype(int)

columns = {'y_pred_proba': 'p', 'y_pred': 'predicted', 'y_true': 'y'}
kind = {'problem_type': 'classification_binary', 'metrics': ['roc_auc']}
size = len(rows) // len(files)
NAMES = {'jensen_shannon': 'js', 'chi2': 'chi2', 'l_infinity': 'l_infinity'}
# one calculator is fitted once, with chunks of the reference as mlref has them
estimator = nannyml.CBPE(**columns, **kind, chunk_size=5_000).fit(past)
realized = nannyml.PerformanceCalculator(**columns, **kind, chunk_size=5_000).fit(past)
drift = nannyml.UnivariateDriftCalculator(
    column_names=list(FEATURES),
    treat_as_categorical=[*CODES, *WORDS],
    continuous_methods=['jensen_shannon'],
    categorical_methods=['jensen_shannon', 'chi2', 'l_infinity'],
    chunk_size=5_000,
).fit(past)
for part in (estimator, realized, drift):
    part.chunker = nannyml.chunk.SizeBasedChunker(chunk_size=size)


def read(result, key, metric, feature=''):
    "Its values and alarms of one metric"
    part = result[key]
    pairs = zip(part['value'].astype(float), part['alert'].astype(bool), strict=True)
    return [[day, metric, feature, value, alarm] for day, (value, alarm) in enumerate(pairs)]


def measure():
    "Estimated and realized AUC, and the drift of every feature"
    found = []
    for part, metric in ((estimator, 'estimated_auc'), (realized, 'realized_auc')):
        result = part.estimate(rows) if part is estimator else part.calculate(rows)
        found += read(result.filter(period='analysis').to_df(), 'roc_auc', metric)
    moved = drift.calculate(rows).filter(period='analysis').to_df()
    for feature in FEATURES:
        for theirs, metric in NAMES.items():
            if (feature, theirs, 'value') in moved.columns:
                found += read(moved, (feature, theirs), metric, feature)
    return found


answer(measure)
