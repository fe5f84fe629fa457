"""A task of eight days of visits, small enough to make in a millisecond, for tests by kind"""

from dataclasses import replace

import numpy as np
import polars as pl

from mlref.core import DAY, Calendar, TrainingSet
from mlref.features import Entity, FeatureSet, FeatureView, Source
from mlref.schema import EventSchema
from mlref.task import Task

ROWS = 400
DAYS = 8
SCHEMA = EventSchema(
    payload={'visit': pl.String, 'shop': pl.String, 'price': pl.Int64, 'late': pl.Int64},
    kinds=('visit', 'end'),
    entity_id='visit',
)


def make_events() -> pl.DataFrame:
    "A visit and its end, an hour later, in order of delivery"
    at = np.arange(ROWS) * DAYS * DAY // ROWS
    ids = [f'v{i}' for i in range(ROWS)]
    shops = [f's{i % 3}' for i in range(ROWS)]
    common = {'visit': ids, 'shop': shops, 'price': np.arange(ROWS) % 7}
    visits = pl.DataFrame(
        {'event_id': ids, 'kind': 'visit', 'event_time': at, 'known_time': at, **common}
    )
    ends = visits.with_columns(
        pl.format('{}e', 'event_id').alias('event_id'),
        pl.col('event_time', 'known_time') + 60,
        kind=pl.lit('end'),
        late=pl.Series(np.arange(ROWS) % 5 == 0).cast(pl.Int64),
    )
    both = pl.concat([visits, ends], how='diagonal').select(list(SCHEMA.columns))
    return both.cast(pl.Schema(SCHEMA.columns)).sort('known_time', 'event_id')


def find_labels(events: pl.DataFrame, now: int) -> pl.DataFrame:
    "Whether a visit was late, known at its end"
    return events.select('visit', y='late', label_time='known_time')


SALES = Source(
    name='sales',
    values={'price': 'cent'},
    rows=lambda events: events.filter(kind='visit').select('shop', 'price', t='known_time'),
    columns=('kind', 'shop', 'price', 'known_time'),
)
SHOP = Entity(name='shop', keys=('shop',))
WEEK = FeatureView(
    name='week', entity=SHOP, source=SALES, stats=('count', 'mean:price'), windows=(7 * DAY,)
)
FEATURES = FeatureSet(name='visits', views=(WEEK,))
TASK = Task(
    name='late-visits',
    entity='visit',
    outcome='ends late',
    schema=SCHEMA,
    contract=(),
    features=FEATURES,
    calendar=Calendar(label_delay=60),
    request_kind='visit',
    request_time='event_time',
    labels=find_labels,
    label_kinds=('end',),
    max_feed_lag={'visit': 240, 'end': 240},
)
OTHER = replace(TASK, name='early-visits')


def make_table(rows: int = ROWS) -> TrainingSet:
    "Labelled rows of eight days"
    random = np.random.default_rng(0)
    cutoff = np.arange(rows) * DAYS * DAY // rows
    y = (random.random(rows) < 0.4).astype(np.float32)
    X = random.normal(size=(rows, 2)).astype(np.float32)
    ids = np.array([f'v{i}' for i in range(rows)])
    return TrainingSet(ids, cutoff, cutoff + 60, y, X, ('a', 'b'), {}, TASK.calendar)
