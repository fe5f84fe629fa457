"""A conversion is exact or refused by name: contracts, pandera, schemas"""

import os
import warnings
from typing import Any

import pandera.polars as pa
import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlref.contracts import (
    RULE_ACTIONS,
    Rule,
    base_rules,
    check_contract,
    check_messages,
    from_pandera,
    to_pandera,
    validate,
)
from mlref.core import MlrefError
from mlref.messages import MessageLimits
from mlref.schema import EventSchema

DEEP = os.environ.get('MLREF_DEEP') == '1'
SCHEMA = EventSchema(
    payload={'name': pl.String, 'size': pl.Int64, 'speed': pl.Float64, 'wet': pl.Boolean},
    kinds=('seen', 'gone'),
    entity_id='name',
    partition_by=('name',),
)
ROWS = 8


@st.composite
def frames(draw):
    "Events with values near the limits of the checks, nulls and NaN"

    def column(values, kind):
        return pl.Series(draw(st.lists(values, min_size=ROWS, max_size=ROWS)), dtype=kind)

    few = st.integers(-2, 3)
    return pl.DataFrame(
        {
            'event_id': column(st.none() | st.sampled_from('ab'), pl.String),
            'kind': column(st.sampled_from(SCHEMA.kinds), pl.String),
            'event_time': column(st.none() | few, pl.Int64),
            'known_time': column(few, pl.Int64),
            'name': column(st.none() | st.sampled_from(['', 'a', 'b']), pl.String),
            'size': column(st.none() | few, pl.Int64),
            'speed': column(
                st.none() | st.sampled_from([-1.0, -0.0, 0.5, 2.0, float('nan'), 1e300]),
                pl.Float64,
            ),
            'wet': column(st.none() | st.booleans(), pl.Boolean),
        }
    )


numbers = st.integers(-2, 3)
_CHECKS = {
    'name': st.sampled_from(['isin', 'notin']),
    'size': st.sampled_from(['in_range', 'isin', 'notin', 'ge', 'gt', 'le', 'lt', 'eq', 'ne']),
    'speed': st.sampled_from(['in_range', 'ge', 'gt', 'le', 'lt', 'eq', 'ne']),
}


def make_check(draw, column: str) -> pa.Check:
    kind = draw(_CHECKS[column])
    options = {'raise_warning': draw(st.booleans()), 'ignore_na': draw(st.booleans())}
    if kind == 'in_range':
        low = draw(numbers)
        ends = {'include_min': draw(st.booleans()), 'include_max': draw(st.booleans())}
        return pa.Check.in_range(low, low + draw(st.integers(1, 3)), **ends, **options)
    if kind in ('isin', 'notin'):
        values = ['', 'a'] if column == 'name' else [0, 1, 3]
        return getattr(pa.Check, kind)(values, **options)
    return getattr(pa.Check, kind)(draw(numbers), **options)


@st.composite
def pandera_schemas(draw):
    "What of pandera can be said by rules"
    columns = {}
    for name in draw(st.lists(st.sampled_from(list(_CHECKS)), unique=True, min_size=1)):
        checks = [make_check(draw, name) for _ in range(draw(st.integers(0, 2)))]
        kind = SCHEMA.columns[name] if draw(st.booleans()) else None
        columns[name] = pa.Column(kind, checks, nullable=draw(st.booleans()))
    return pa.DataFrameSchema(columns)


def broken_rows(schema: pa.DataFrameSchema, frame: pl.DataFrame) -> tuple[set, set]:
    "The rows that pandera refuses, and those of which it only warns"
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter('always')
        try:
            schema.validate(frame, lazy=True)
            refused = set()
        except pa.errors.SchemaErrors as error:
            refused = set(error.failure_cases['index'])
    return refused, {str(one.message) for one in told if one.category is pa.errors.SchemaWarning}


@settings(max_examples=600 if DEEP else 40, deadline=None, derandomize=not DEEP)
@given(pandera_schemas(), frames())
def test_rules_of_a_pandera_schema_refuse_the_rows_that_it_refuses(schema, frame):
    rules = from_pandera(schema)
    got = validate(frame.with_row_index('_row'), rules)
    refused, warned = broken_rows(schema, frame)
    assert set(got.bad['_row']) == refused
    warning = [m for m in got.metrics if m.action == 'warn' and m.broken]
    assert bool(warning) == bool(warned)
    assert len({rule.name for rule in rules}) == len(rules)
    count = sum(
        len(c.checks) + (not c.nullable) + (c.dtype is not None) for c in schema.columns.values()
    )
    assert len(rules) == count


@st.composite
def contracts(draw):
    "Rules of every action"
    count = draw(st.integers(0, 5))
    holds = [
        pl.col('size') > 0,
        pl.col('name').is_in(['a']),
        pl.col('speed').is_null() | (pl.col('speed') < 1),
        pl.col('known_time') >= pl.col('event_time'),
    ]
    return tuple(
        Rule(
            name=f'rule {i}',
            kinds=draw(st.sampled_from([(), ('seen',), ('seen', 'gone')])),
            holds=draw(st.sampled_from(holds)),
            action=draw(st.sampled_from(RULE_ACTIONS)),
            max_rows=draw(st.integers(0, 2)),
        )
        for i in range(count)
    )


@settings(max_examples=300 if DEEP else 25, deadline=None, derandomize=not DEEP)
@given(contracts(), frames())
def test_a_contract_goes_to_pandera_and_comes_back(rules, frame):
    schema = to_pandera(rules, SCHEMA)
    back = from_pandera(schema)
    assert len(back) == len(rules) and all(a is b for a, b in zip(back, rules, strict=True))
    got = validate(frame.with_row_index('_row'), rules)
    assert set(got.bad['_row']) == broken_rows(schema, frame)[0]


@pytest.mark.parametrize(
    'setting',
    [
        {'unique': True},
        {'coerce': True},
        {'required': False},
        {'regex': True},
        {'default': 1},
        {'drop_invalid_rows': True},
    ],
)
def test_a_setting_of_a_column_that_no_rule_can_say_is_refused_by_name(setting):
    schema = pa.DataFrameSchema({'size': pa.Column(pl.Int64, **setting)})
    with pytest.raises(MlrefError, match=f'the column size without {next(iter(setting))}'):
        from_pandera(schema)


@pytest.mark.parametrize(
    'setting',
    [
        {'unique': ['size', 'name']},
        {'strict': True},
        {'strict': 'filter'},
        {'dtype': pl.Int64},
        {'coerce': True},
        {'ordered': True},
        {'add_missing_columns': True},
        {'drop_invalid_rows': True},
    ],
)
def test_a_setting_of_a_schema_that_no_rule_can_say_is_refused_by_name(setting):
    schema = pa.DataFrameSchema({'size': pa.Column(pl.Int64)}, **setting)
    with pytest.raises(MlrefError, match=f'a schema without {next(iter(setting))}'):
        from_pandera(schema)


def positive(data: Any) -> pl.LazyFrame:
    return data.lazyframe.select(pl.col(data.key) > 0)


@pytest.mark.parametrize(
    'check, why',
    [
        (pa.Check.str_length(1, 3), 'got str_length'),
        (pa.Check.str_matches('a'), 'got str_matches'),
        (pa.Check(positive, name='in_range'), 'got in_range'),
        (pa.Check(positive, name='x', statistics={'min_value': 0, 'max_value': 1}), 'got x'),
        (pa.Check.ge(0, element_wise=True), 'without element_wise'),
        (pa.Check.ge(0, groupby='size'), 'without group'),
    ],
)
def test_a_check_that_is_not_understood_is_refused_by_name(check, why):
    with pytest.raises(MlrefError, match=why):
        from_pandera(pa.DataFrameSchema({'size': pa.Column(pl.Int64, check)}))


def test_what_was_changed_on_the_way_is_not_taken_for_what_was_made():
    rules = base_rules(SCHEMA)
    for change in ('function', 'warning', 'type', 'null'):
        schema = to_pandera(rules, SCHEMA)
        if change == 'function':
            schema.checks[0]._check_fn = lambda data: True
        if change == 'warning':
            schema.checks[0].raise_warning = True
        if change == 'type':
            schema = schema.update_column('size', dtype=pl.Float64)
            assert [rule.name for rule in from_pandera(schema)][-1] == 'size: Float64'
        elif change == 'null':
            schema = schema.update_column('size', nullable=False)
            assert [rule.name for rule in from_pandera(schema)][-1] == 'size: there'
        else:
            with pytest.raises(MlrefError, match='kind is known'):
                from_pandera(schema)


def test_a_type_holds_for_every_row_or_none():
    (rule,) = from_pandera(pa.DataFrameSchema({'size': pa.Column(pl.Int64, nullable=True)}))
    frame = pl.DataFrame({'size': [1, None]})
    assert validate(frame, (rule,)).bad.height == 0
    wrong = validate(frame.with_columns(pl.col('size').cast(pl.Float64)), (rule,))
    assert (wrong.bad.height, len(wrong.failed)) == (2, 1)


GOOD = {'name': 'big', 'holds': pl.col('size') > 0}


@pytest.mark.parametrize(
    'change, why',
    [
        ({'action': 'drop'}, "got 'drop'"),
        ({'action': None}, 'got None'),
        ({'kinds': 'seen'}, "got 'seen'; list them"),
        ({'kinds': (7,)}, 'expected a tuple of kinds'),
        ({'name': ''}, 'a rule with a name'),
        ({'holds': True}, 'a polars expression, got .*bool'),
        ({'max_share': float('nan')}, 'a number from 0 to 1'),
        ({'max_rows': -1}, 'a whole number from 0'),
    ],
)
def test_a_rule_that_could_not_be_asked_is_refused_when_it_is_made(change, why):
    assert Rule(**GOOD).action == 'quarantine'
    with pytest.raises(MlrefError, match=why):
        Rule(**{**GOOD, **change})


def test_a_contract_that_would_lose_a_rule_is_refused_on_every_way_in():
    twice = (Rule(**GOOD), Rule(**GOOD))
    other = (Rule(**GOOD, kinds=('rumour',)),)
    for rules, why in ((twice, 'got big more than once'), (other, 'got some about rumour')):
        with pytest.raises(MlrefError, match=why):
            check_contract(rules, SCHEMA)
        with pytest.raises(MlrefError, match=why):
            to_pandera(rules, SCHEMA)
        with pytest.raises(MlrefError, match=why):
            check_messages([b'{}'], SCHEMA, rules)
    with pytest.raises(MlrefError, match='got big more than once'):
        validate(pl.DataFrame({'size': [1]}), twice)


@pytest.mark.parametrize(
    'change, why',
    [
        ({'kinds': ('seen', 'seen')}, "kinds of an event schema once, got 'seen' twice"),
        ({'kinds': 'seen'}, "kinds of EventSchema as .*, got 'seen'"),
        (
            {'partition_by': ('name', 'name')},
            "partition_by of .* once, got 'name' twice",
        ),
        ({'payload': {'name': pl.String, 'at': pl.Datetime}}, "got 'at' of Datetime"),
        ({'payload': {'name': pl.String, 'tags': pl.List(pl.String)}}, "got 'tags' of List"),
        ({'payload': {'name': pl.UInt64}}, "got 'name' of UInt64"),
        ({'payload': {'name': str}}, "got 'name' of"),
    ],
)
def test_a_schema_that_would_convert_or_lose_something_is_refused(change, why):
    made = {'payload': SCHEMA.payload, 'kinds': SCHEMA.kinds, 'entity_id': 'name'}
    assert EventSchema(**made).limits == MessageLimits()
    with pytest.raises(MlrefError, match=why):
        EventSchema(**{**made, **change})
