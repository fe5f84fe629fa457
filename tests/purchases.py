"""A shop's customers as a task: at each visit, will this customer buy again within 60 days?"""

import importlib.util
from pathlib import Path

import numpy as np
import polars as pl

from mlref.contracts import Rule, base_rules
from mlref.core import DAY, Calendar
from mlref.events import sort_events
from mlref.features import Entity, FeatureSet, FeatureView, OnDemand, Source
from mlref.schema import EventSchema
from mlref.task import Task

SHOP_SCHEMA = EventSchema(
    payload={'visit': pl.Int64, 'customer': pl.Int64, 'items': pl.Int64, 'cents': pl.Int64},
    kinds=('purchase', 'visit'),
    entity_id='visit',
    partition_by=('customer',),
)


def shop_file() -> Path:
    "The raw file in the installed package, which is not imported"
    package = importlib.util.find_spec('lifetimes').origin
    return Path(package).parent / 'datasets' / 'CDNOW_master.txt'


def read_purchases(file: Path) -> pl.DataFrame:
    "One row per line of the file: customer, day, items, cents"
    lines = pl.read_csv(file, has_header=False, skip_rows=1, new_columns=['line'])
    word = pl.col('line').str.extract_all(r'\S+').list
    dollars = word.get(3).cast(pl.Float64)
    return lines.select(
        customer=word.get(0).cast(pl.Int64),
        day=word.get(1).str.to_date('%Y%m%d').cast(pl.Int32).cast(pl.Int64),
        items=word.get(2).cast(pl.Int64),
        cents=(100 * dollars).round().cast(pl.Int64),
    )


def shop_events(rows: pl.DataFrame) -> pl.DataFrame:
    "Purchases, and one visit per customer and day, in order of delivery"
    copy = pl.int_range(pl.len()).over('customer', 'day')  # two purchases of a day are two
    purchases = rows.select(
        event_id=pl.format('purchase:{}:{}:{}', 'customer', 'day', copy),
        kind=pl.lit('purchase'),
        event_time=pl.col('day') * DAY,
        known_time=pl.col('day') * DAY,
        visit=pl.col('customer') * 100_000 + pl.col('day'),
        customer='customer',
        items='items',
        cents='cents',
    )
    visits = purchases.unique('visit').with_columns(
        event_id=pl.format('visit:{}', 'visit'),
        kind=pl.lit('visit'),
        items=pl.lit(None, pl.Int64),
        cents=pl.lit(None, pl.Int64),
    )
    return sort_events(pl.concat([purchases, visits]), SHOP_SCHEMA)


SHOP_RULES = (
    *base_rules(SHOP_SCHEMA, entity_kinds=('purchase', 'visit')),
    Rule(name='items above 0', kinds=('purchase',), holds=pl.col('items') > 0),
    Rule(name='price not negative', kinds=('purchase',), holds=pl.col('cents') >= 0),
)
TERM = 60 * DAY


def shop_labels(events: pl.DataFrame, now: int) -> pl.DataFrame:
    "Yes is known at the next visit, no after 60 days"
    visits = events.filter(kind='visit').filter(pl.col('known_time') <= now)
    again = pl.col('event_time').shift(-1).over('customer', order_by='event_time')
    deadline = pl.col('event_time') + TERM
    returned = (again <= deadline).fill_null(False)
    known = pl.when(returned).then(again).otherwise(deadline)
    labels = visits.select('visit', y=returned.cast(pl.Float32), label_time=known)
    return labels.filter(pl.col('label_time') <= now)


def purchase_rows(events: pl.DataFrame) -> pl.DataFrame:
    bought = events.filter(kind='purchase').sort('known_time')
    return bought.select(
        'customer', 'items', 'cents', t='known_time', day=pl.col('known_time') // DAY
    )


CUSTOMER = Entity(name='customer', keys=('customer',))
UNITS = {'items': 'item', 'cents': 'cent', 'day': 'day'}
BOUGHT = Source(name='bought', values=UNITS, rows=purchase_rows, newest=False)
LAST = Source(name='last', values=UNITS, rows=purchase_rows, newest=True)


def calendar_columns(request: dict, x: np.ndarray, lookups: object) -> list[np.ndarray]:
    day = request['cutoff'] // DAY
    return [(day + 3) % 7, day - x[0]]


SHOP_FEATURES = FeatureSet(
    name='shop',
    views=(
        FeatureView(
            name='bought',
            entity=CUSTOMER,
            source=BOUGHT,
            stats=('count', 'sum:items', 'sum:cents'),
            windows=(30 * DAY, 90 * DAY, 365 * DAY),
        ),
        FeatureView(
            name='ever', entity=CUSTOMER, source=BOUGHT, stats=('min:day',), windows=(730 * DAY,)
        ),
        FeatureView(
            name='last',
            entity=CUSTOMER,
            source=LAST,
            stats=('age', 'cents'),
            ahead=-1,  # the purchase before this one
        ),
    ),
    on_demand=(
        OnDemand(
            name='calendar',
            outputs=('weekday', 'days_since_first'),
            make=calendar_columns,
            inputs=('ever_min_day_1051200m',),
        ),
    ),
)
SHOP = Task(
    name='returns',
    entity='visit',
    outcome='buys again within 60 days',
    schema=SHOP_SCHEMA,
    contract=SHOP_RULES,
    features=SHOP_FEATURES,
    calendar=Calendar(label_delay=TERM),
    request_kind='visit',
    request_time='event_time',
    labels=shop_labels,
    label_kinds=('visit',),
    monitored=('bought_n_43200m', 'last_age', 'days_since_first'),
)
