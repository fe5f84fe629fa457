"""Count sketches: they add up however rows are dealt, and their metrics are those of NannyML"""

import json
import os
import warnings
from dataclasses import replace

import numpy as np
import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import chi2_contingency

from mlref import sketches
from mlref.arguments import MlrefError
from mlref.count_metrics import (
    auc_slack,
    chi_squared,
    fit_reference,
    js_distance,
    largest_change,
    measure_sketch,
    metrics_table,
    realized_metrics,
    stability_index,
)
from mlref.diagnosis import diagnose, name_segments
from mlref.evaluate import auc, brier, ece, log_loss
from mlref.sketches import (
    Sketch,
    add_sketches,
    count_groups,
    count_labels,
    count_rows,
    decode_sketch,
    empty_sketch,
    encode_sketch,
    freeze_bins,
    label_predictions,
)
from mlref.watch import diagnose_evening

os.environ['NML_DISABLE_USAGE_LOGGING'] = '1'
DEEP = os.environ.get('MLREF_DEEP') == '1'
TRIES = settings(max_examples=1000 if DEEP else 60, deadline=None, derandomize=True)
FEATURES = ('wind', 'shop')
VALUE = st.one_of(st.none(), st.floats(width=32), st.sampled_from([0.0, 0.5, 1.0]))
SHOP = st.one_of(st.none(), st.integers(-2, 3))
LABEL = st.sampled_from([None, 0.0, 1.0])
SCORE = st.one_of(st.floats(0, 1, width=32), st.sampled_from([0.0, 0.25, 1.0]))
ROW = st.tuples(SCORE, LABEL, VALUE, SHOP)
SCHEMA = {'p': pl.Float64, 'y': pl.Float64, 'wind': pl.Float64, 'shop': pl.Int64}


def frame(rows: list) -> pl.DataFrame:
    return pl.DataFrame(rows, schema=SCHEMA, orient='row')


def make_rows(n: int, seed: int = 0) -> pl.DataFrame:
    "Scores that are right, a feature of floats and one of codes"
    random = np.random.default_rng(seed)
    p = random.beta(2, 5, n)
    return pl.DataFrame(
        {
            'p': p,
            'y': (random.random(n) < p).astype(float),
            'wind': random.normal(size=n),
            'shop': random.integers(0, 5, n),
        }
    )


PAST = make_rows(4000)
BINS = freeze_bins(PAST, FEATURES)
PAST_DAY = np.arange(4000) // 200
REFERENCE = fit_reference(PAST, PAST_DAY, FEATURES)


def everything(sketch: Sketch) -> tuple:
    "All that a sketch holds, as values that can be compared"
    arrays = [getattr(sketch.scores, name).tolist() for name in sketches.ARRAYS]
    values = {name: each.tolist() for name, each in sketch.values.items()}
    categories = {name: dict(each) for name, each in sketch.categories.items()}
    return (
        *arrays,
        values,
        categories,
        dict(sketch.missing),
        sketch.scores.on_grid,
        sketch.bins.digest,
    )


@TRIES
@given(st.lists(ROW, max_size=40), st.lists(st.integers(0, 3), min_size=40, max_size=40))
@pytest.mark.parametrize('most', [sketches.MAX_SCORES, 7])
def test_sketches_add_up_however_rows_are_dealt(most, rows, server):
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(sketches, 'MAX_SCORES', most)  # 7: nearly all are put on the grid
        whole = everything(count_rows(frame(rows), BINS))
        dealt = [
            count_rows(frame([r for r, s in zip(rows, server, strict=False) if s == k]), BINS)
            for k in range(4)
        ]
        assert everything(add_sketches(dealt)) == whole
        assert everything(add_sketches([*dealt[2:], empty_sketch(BINS), *dealt[:2]])) == whole
        left = add_sketches([add_sketches(dealt[:2]), dealt[2]])
        assert everything(add_sketches([left, dealt[3]])) == whole
        right = add_sketches([dealt[1], add_sketches(dealt[2:])])
        assert everything(add_sketches([dealt[0], right])) == whole
        assert everything(decode_sketch(encode_sketch(count_rows(frame(rows), BINS)))) == whole


@TRIES
@given(st.lists(ROW, max_size=40))
def test_nothing_that_was_scored_is_lost(rows):
    table = frame(rows)
    sketch = count_rows(table, BINS)
    assert sketch.rows == len(rows)
    assert sketch.values['wind'].sum() + sketch.missing['wind'] == len(rows)
    assert sum(sketch.categories['shop'].values()) + sketch.missing['shop'] == len(rows)
    later = add_sketches([count_rows(table.drop('y'), BINS), count_labels(table, BINS)])
    assert everything(later) == everything(sketch)


@TRIES
@given(st.lists(ROW, min_size=1, max_size=40))
def test_metrics_of_counts_are_those_of_rows(rows):
    table = frame(rows)
    found = realized_metrics(count_rows(table, BINS))
    known = table.drop_nulls('y')
    y, p = known['y'].to_numpy(), known['p'].to_numpy()
    if not len(y):
        assert np.isnan(list(found.values())).all()
        return
    by_rows = {
        'realized_auc': auc(y, p),
        'realized_log_loss': log_loss(y, p),
        'brier': brier(y, p),
        'ece': ece(y, p),
        'calibration_gap': p.mean() - y.mean(),
    }
    assert found == pytest.approx(by_rows, rel=1e-9, abs=1e-12, nan_ok=True)


def test_the_grid_moves_the_auc_by_no_more_than_it_says(monkeypatch):
    rows = make_rows(20_000)
    exact = realized_metrics(count_rows(rows, BINS))['realized_auc']
    monkeypatch.setattr(sketches, 'MAX_SCORES', 64)
    coarse = count_rows(rows, BINS)
    slack = auc_slack(coarse)
    assert coarse.scores.on_grid and len(coarse.scores.score) <= 64 and slack > 0
    assert 0 < abs(realized_metrics(coarse)['realized_auc'] - exact) <= slack


def test_the_grid_of_the_library_is_fine_enough_for_a_million_scores():
    rows = make_rows(300_000).select('p', 'y')
    bins = freeze_bins(rows, ())
    sketch = count_rows(rows, bins)
    found = realized_metrics(sketch)
    y, p = rows['y'].to_numpy(), rows['p'].to_numpy()
    assert sketch.scores.on_grid and len(encode_sketch(sketch)) < 1_000_000
    assert abs(found['realized_auc'] - auc(y, p)) <= auc_slack(sketch) < 2e-5
    assert found['calibration_gap'] == pytest.approx(p.mean() - y.mean(), abs=2**-17)
    assert found['brier'] == pytest.approx(brier(y, p), abs=2**-16)


# --- NannyML, on the data sets that it brings and on made ones ---


def long_table(result, methods: tuple[str, ...], metric: str = '') -> pl.DataFrame:
    "What NannyML found, in the columns of the table of metrics"
    data = result.filter(period='analysis').to_df()
    found = []
    for key in {column[:-1] for column in data.columns if column[0] != 'chunk'}:
        if key[-1] not in methods:
            continue
        part = data[key]
        low, high = (
            part[name].astype(float).tolist() for name in ('lower_threshold', 'upper_threshold')
        )
        found.append(
            pl.DataFrame(
                {
                    'day': np.arange(len(part)),
                    'metric': metric or {'jensen_shannon': 'js'}.get(key[-1], key[-1]),
                    'feature': '' if metric else key[0],
                    'theirs': part['value'].astype(float).to_numpy(),
                    'their_low': low,
                    'their_high': high,
                    'their_alarm': part['alert'].astype(bool).to_numpy(),
                }
            ).fill_nan(None)
        )
    return pl.concat(found, how='vertical_relaxed')


def nannyml_table(past, rows, features, size: int, truth: str) -> pl.DataFrame:
    "All that NannyML says of chunks of rows; `past` and `rows` are frames of pandas"
    import nannyml

    columns = {'y_pred_proba': 'y_pred_proba', 'y_pred': 'y_pred', 'y_true': truth}
    kind = {'problem_type': 'classification_binary', 'metrics': ['roc_auc'], 'chunk_size': size}
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        cbpe = nannyml.CBPE(**columns, **kind).fit(past).estimate(rows)
        realized = nannyml.PerformanceCalculator(**columns, **kind).fit(past).calculate(rows)
        floats = past[list(features)].dtypes == 'float64'
        drift = nannyml.UnivariateDriftCalculator(
            column_names=list(features),
            treat_as_categorical=[name for name in features if not floats[name]],
            continuous_methods=['jensen_shannon'],
            categorical_methods=['jensen_shannon', 'chi2', 'l_infinity'],
            chunk_size=size,
        )
        moved = drift.fit(past).calculate(rows)
    return pl.concat(
        [
            long_table(cbpe, ('roc_auc',), 'estimated_auc'),
            long_table(realized, ('roc_auc',), 'realized_auc'),
            long_table(moved, ('jensen_shannon', 'chi2', 'l_infinity')),
        ]
    )


def our_table(past, rows, features, size: int, truth: str) -> pl.DataFrame:
    "The same from counts"
    kept = ['y_pred_proba', truth, *features]
    names = {'y_pred_proba': 'p', truth: 'y'}
    ours, later = (pl.from_pandas(each[kept]).rename(names) for each in (past, rows))
    reference = fit_reference(ours, np.arange(ours.height) // size, features)
    day = np.arange(later.height) // size
    return metrics_table(reference, count_groups(later, day, reference.bins))


def compare(past, rows, features, size, truth) -> pl.DataFrame:
    "Both tables side by side; raises unless they are equal"
    theirs = nannyml_table(past, rows, features, size, truth)
    ours = our_table(past, rows, features, size, truth).with_columns(
        pl.col('day').to_physical().cast(pl.Int64)
    )
    both = ours.join(theirs.cast({'day': pl.Int64}), on=['day', 'metric', 'feature'])
    assert both.height == theirs.height
    near = pl.when(pl.col('metric') == 'estimated_auc').then(1e-6).otherwise(1e-9)
    apart = (pl.col('value') - pl.col('theirs')).abs() / pl.max_horizontal(1, pl.col('theirs'))
    for wrong in (
        both.filter(pl.col('value').is_null() != pl.col('theirs').is_null()),
        both.filter(apart > near),
        both.filter(pl.col('alarm') != pl.col('their_alarm')),
    ):
        assert not wrong.height, wrong
    for mine, their in (('threshold_low', 'their_low'), ('threshold_high', 'their_high')):
        assert both.filter(pl.col(mine).is_null() != pl.col(their).is_null()).is_empty()
        assert both.filter((pl.col(mine) - pl.col(their)).abs() > 1e-9).is_empty()
    return both


CAR = (
    'car_value',
    'debt_to_income_ratio',
    'loan_length',
    'driver_tenure',
    'salary_range',
    'repaid_loan_on_prev_car',
    'size_of_downpayment',
)
OFFICE = (
    'distance_from_office',
    'gas_price_per_litre',
    'public_transportation_cost',
    'tenure',
    'salary_range',
    'wfh_prev_workday',
    'workday',
)


def with_truth(rows, truth, outcomes):
    return rows.assign(**{truth: outcomes[truth].to_numpy()})


@pytest.fixture(scope='module')
def nannyml():
    return pytest.importorskip('nannyml')


def test_car_loans_are_judged_as_by_nannyml(nannyml):
    past, rows, outcomes = nannyml.load_synthetic_car_loan_dataset()
    found = compare(past, with_truth(rows, 'repaid', outcomes), CAR, 5000, 'repaid')
    assert found['alarm'].sum() > 20  # something changed, and both see it


@pytest.mark.skipif(not DEEP, reason='another data set of the same kind; set MLREF_DEEP=1')
def test_car_loans_with_missing_values_are_judged_as_by_nannyml(nannyml):
    past, rows, outcomes = nannyml.load_synthetic_car_loan_data_quality_dataset()
    rows = with_truth(rows, 'repaid', outcomes)
    assert rows[list(CAR)].isna().any().any()
    compare(past, rows, CAR, 5000, 'repaid')


@pytest.mark.skipif(not DEEP, reason='another data set of the same kind; set MLREF_DEEP=1')
def test_work_from_home_is_judged_as_by_nannyml(nannyml):
    past, rows, outcomes = nannyml.load_synthetic_binary_classification_dataset()
    rows = with_truth(rows, 'work_home_actual', outcomes)
    compare(past, rows, OFFICE, 5000, 'work_home_actual')


@pytest.mark.skipif(not DEEP, reason='the census has 280,000 rows; set MLREF_DEEP=1')
def test_the_census_is_judged_as_by_nannyml(nannyml):
    past, rows, outcomes = nannyml.load_us_census_ma_employment_data()
    names = {'predicted_probability': 'y_pred_proba', 'prediction': 'y_pred'}
    past = past.rename(columns=names)
    rows = with_truth(rows, 'employed', outcomes).rename(columns=names)
    features = ('AGEP', 'SCHL', 'MAR', 'RELP', 'DIS', 'CIT', 'RAC1P')
    compare(past, rows, features, 5000, 'employed')


@pytest.mark.parametrize('seed', range(20 if DEEP else 1))
def test_odd_days_are_judged_as_by_nannyml(nannyml, seed):
    "Distinct scores, thin chunks, values that are missing, new, constant or far outside"
    random = np.random.default_rng(seed)
    past, rows = (make_rows(n, seed + 10 * n) for n in (4000, 1300))
    p = rows['p'].to_numpy()
    rows = rows.with_columns(
        p=pl.Series(p ** random.uniform(0.5, 1.5)),
        wind=pl.Series(np.where(random.random(1300) < 0.2, np.nan, rows['wind'] * 5)),
        shop=pl.when(pl.int_range(1300) > 900).then(77).otherwise('shop'),
    )
    tables = [
        each.with_columns(level=pl.lit(1.5), shop=pl.format('s{}', 'shop')).to_pandas()
        for each in (past, rows)
    ]
    past, rows = (
        each.rename(columns={'p': 'y_pred_proba'}).assign(y_pred=(each['p'] > 0.5).astype(int))
        for each in tables
    )
    rows.loc[200:299, 'y'] = 1.0  # a chunk of one class
    compare(past, rows, ('wind', 'shop', 'level'), 100, 'y')


# --- edges ---


@TRIES
@given(
    st.lists(st.floats(allow_nan=False, allow_infinity=False), max_size=30),
    st.integers(1, 30),
    st.floats(-1e6, 1e6),
    st.floats(1e-6, 1e6),
    st.booleans(),
)
def test_every_value_falls_between_its_edges(values, steps, start, width, even):
    edges = np.linspace(start, start + width, steps + 1)
    if not even:
        edges = np.unique(edges**3)
    at = np.concatenate([values, edges, np.nextafter(edges, -np.inf), np.nextafter(edges, np.inf)])
    found = sketches._find_places(at, edges)
    assert found.tolist() == np.searchsorted(edges, at, 'right').tolist()


@TRIES
@given(st.lists(st.tuples(st.integers(0, 50), st.integers(0, 50)), min_size=1, max_size=6))
def test_chi_squared_is_that_of_scipy(rows):
    before, now = ({str(k): each[side] for k, each in enumerate(rows)} for side in (0, 1))
    table = np.array(rows).T[:, np.array(rows).sum(axis=1) > 0]
    found = chi_squared(before, now)
    if not table.sum(axis=1).all() or not table.size:
        assert np.isnan(found).all()
    else:
        theirs = chi2_contingency(table)
        assert found == pytest.approx((theirs.statistic, theirs.pvalue), rel=1e-9, abs=1e-12)


def test_distances_of_distributions():
    one, other = np.array([10, 0]), np.array([0, 7])
    assert js_distance(one, other) == 1 and js_distance(one, one * 3) == 0
    assert np.isnan([js_distance(one, other * 0), stability_index(one * 0, other)]).all()
    assert stability_index(one, one * 2) == 0 < stability_index(one, other)
    assert stability_index(one, other) == stability_index(other, one)
    # by hand: shares .5 .5 against .25 .75
    by_hand = (0.25 - 0.5) * np.log(0.5) + (0.75 - 0.5) * np.log(1.5)
    assert stability_index(np.array([5, 5]), np.array([1, 3])) == pytest.approx(by_hand)
    assert chi_squared({'a': 3}, {'a': 9}) == (0, 1)
    assert largest_change({'a': 1}, {'b': 1}) == 1
    assert np.isnan([*chi_squared({'a': 3}, {}), largest_change({}, {'a': 1})]).all()


DAYS = {
    'no row': PAST.head(0),
    'one row': PAST.head(1),
    'one class': PAST.filter(pl.col('y') == 1),
    'no label': PAST.with_columns(y=pl.lit(None, pl.Float64)),
    'a label that is NaN': PAST.with_columns(y=pl.lit(np.nan)),
    'one score': PAST.with_columns(p=pl.lit(0.3)),
    'scores of 0 and 1': PAST.with_columns(p=(pl.col('p') > 0.5).cast(pl.Float64)),
    'float32': PAST.cast({'p': pl.Float32, 'wind': pl.Float32}),
    'a constant feature': PAST.with_columns(wind=pl.lit(0.0)),
    'infinite values': PAST.with_columns(wind=pl.lit(-np.inf)),
    'no value': PAST.with_columns(wind=pl.lit(None, pl.Float64), shop=pl.lit(None, pl.Int64)),
    'a column without a type': PAST.with_columns(wind=pl.lit(None), shop=pl.lit(None)),
    'an unseen category': PAST.with_columns(shop=pl.lit(-1, pl.Int64)),
}


@pytest.mark.parametrize('rows', DAYS.values(), ids=DAYS)
def test_every_day_has_a_table(rows):
    table = metrics_table(REFERENCE, {7: count_rows(rows, REFERENCE.bins)})
    assert table['metric'].len() == 14 and table['alarm'].null_count() == 0
    assert not table['value'].is_nan().any() and not table['value'].is_infinite().any()
    assert table['n'].min() >= 0 and table['day'].n_unique() == 1
    again = decode_sketch(encode_sketch(count_rows(rows, REFERENCE.bins)))
    assert metrics_table(REFERENCE, {7: again}).equals(table)


def test_unseen_infinite_and_missing_are_alarms():
    for name, metric, feature in (
        ('an unseen category', 'js', 'shop'),
        ('infinite values', 'js', 'wind'),
        ('no value', 'missing_share', 'wind'),
    ):
        table = metrics_table(REFERENCE, {7: count_rows(DAYS[name], REFERENCE.bins)})
        row = table.filter((pl.col('metric') == metric) & (pl.col('feature') == feature))
        assert row['alarm'].item() and row['value'].item() == pytest.approx(1), name


def test_a_clock_that_goes_backwards_changes_nothing():
    rows = make_rows(900, 5)
    day = np.arange(900) // 300
    table = metrics_table(REFERENCE, count_groups(rows, day, REFERENCE.bins))
    shuffled = np.random.default_rng(0).permutation(900)
    again = count_groups(rows[shuffled], day[shuffled], REFERENCE.bins)
    late = dict(reversed(again.items()))
    assert metrics_table(REFERENCE, late).equals(table)
    assert table['day'].is_sorted()


def test_labels_are_joined_or_counted():
    predictions = pl.DataFrame({'id': ['a', 'b', 'c', 'd'], 'p': [0.1, 0.2, 0.3, 0.4]})
    labels = pl.DataFrame({'id': ['b', 'a', 'a', 'c', 'c', 'x', 'x'], 'y': [1, 0, 0, 0, 1, 1, 0]})
    found = label_predictions(predictions, labels)
    assert found.rows['y'].to_list() == [0, 1, None, None]
    assert found.rows['id'].to_list() == ['a', 'b', 'c', 'd']
    assert (found.repeated, found.contradictory, found.unknown) == (1, 1, 1)
    nothing = label_predictions(predictions, labels.head(0))
    assert nothing.rows['y'].null_count() == 4
    for wrong in (
        labels.with_columns(y=pl.lit(2)),
        labels.with_columns(y=pl.lit(None, pl.Float64)),
        labels.rename({'y': 'late'}),
    ):
        with pytest.raises(MlrefError, match='^expected '):
            label_predictions(predictions, wrong)


def test_bytes_that_are_no_sketch_are_refused():
    good = count_rows(PAST.head(50), BINS)
    data = encode_sketch(good)
    broken = [b'', b'no zip', data[:100], data[:-1], data[:60] + b'\xff' + data[61:]]
    impossible = (
        {'scores': replace(good.scores, n=-good.scores.n)},
        {'scores': replace(good.scores, score=good.scores.score[::-1])},
        {'scores': replace(good.scores, labelled=good.scores.labelled[:-1])},
        {'missing': {}},
        {'values': {'wind': good.values['wind'][:-1]}},
        {'categories': {}},
        {'categories': {'shop': {'1': -4}}},
    )
    broken += [encode_sketch(replace(good, **changed)) for changed in impossible]
    for bytes_ in broken:
        with pytest.raises(MlrefError, match='^expected the bytes of a sketch'):
            decode_sketch(bytes_)


def test_too_many_categories_are_refused_in_words():
    many = pl.DataFrame({'p': [0.5] * 10_001, 'who': range(10_001)})
    bins = freeze_bins(many, ('who',))
    with pytest.raises(MlrefError, match='^expected at most 10000 values of who'):
        count_rows(many, bins)


WRONG = {
    'no labels': PAST.drop('y'),
    'a label that is not known': PAST.with_columns(y=pl.lit(None, pl.Float64)),
    'one class': PAST.with_columns(y=pl.lit(0.0)),
    'no score': PAST.with_columns(p=pl.lit(None, pl.Float64)),
    'infinite': PAST.with_columns(wind=pl.lit(np.inf)),
    'no feature': PAST.drop('shop'),
}


@pytest.mark.parametrize('rows', WRONG.values(), ids=WRONG)
def test_a_wrong_reference_is_refused_in_words(rows):
    with pytest.raises(MlrefError, match='^expected '):
        fit_reference(rows, PAST_DAY, FEATURES)


def test_a_thousand_sketches_are_added_exactly():
    rows = make_rows(3000)
    parts = count_groups(rows, np.arange(3000) // 3, BINS)
    assert everything(add_sketches(parts.values())) == everything(count_rows(rows, BINS))
    assert len(measure_sketch(REFERENCE.sketch, parts[5])) == 14


def test_a_diagnosis_names_the_fault_and_its_segment():
    rows = make_rows(2000, 9)
    cases = {
        'higher': rows.with_columns(pl.col('wind') + 5),
        'lower': rows.with_columns(pl.col('wind') - 5),
        'missing': rows.with_columns(wind=pl.lit(None, pl.Float64)),
    }
    for direction, moved in cases.items():
        found = diagnose(REFERENCE, count_rows(moved, REFERENCE.bins))
        assert [(each.feature, each.direction) for each in found.shifts] == [('wind', direction)]
    new = diagnose(REFERENCE, count_rows(rows.with_columns(shop=pl.lit(9)), REFERENCE.bins))
    assert new.shifts[0].direction == 'new value 9 more'
    wrong = rows.with_columns(y=pl.when(pl.col('shop') == 3).then(1.0).otherwise('y'))
    parts = count_groups(wrong, wrong['shop'].to_numpy(), REFERENCE.bins)
    worst = diagnose(REFERENCE, add_sketches(parts.values()), parts)
    assert worst.segments[0].segment == '3' and worst.segments[0].gap < -0.5
    assert not worst.shifts and 'no feature is outside' in worst.text()


def where_it_moved(evening: pl.DataFrame) -> dict[str, str]:
    "Features outside their limits, each with the segment that carries it"
    found = diagnose(REFERENCE, count_rows(evening, REFERENCE.bins))
    named = name_segments(REFERENCE, evening, found.shifts)
    return {each.feature: each.segment for each in named}


@pytest.mark.parametrize('fault', ['higher', 'missing'])
@pytest.mark.parametrize('shop', range(5))
def test_a_shift_names_the_one_segment_that_carries_it(fault, shop):
    rows = make_rows(900, shop)
    there = pl.when(pl.col('shop') == shop)
    wrong = {'higher': there.then(9.0), 'missing': there.then(pl.lit(None, pl.Float64))}
    spoilt = rows.with_columns(wind=wrong[fault].otherwise('wind'))
    assert where_it_moved(spoilt) == {'wind': f'shop={shop}'}


def test_a_shift_of_all_or_of_half_the_segments_names_none():
    rows = make_rows(900, 9)
    assert where_it_moved(rows.with_columns(pl.col('wind') + 5)) == {'wind': ''}
    half = pl.when(pl.col('shop') < 3).then(pl.col('wind') + 5).otherwise('wind')
    assert where_it_moved(rows.with_columns(wind=half)) == {'wind': ''}
    assert where_it_moved(rows) == {}
    # a segment is not the explanation of its own share
    assert where_it_moved(rows.with_columns(shop=pl.lit(9))) == {'shop': ''}


@pytest.mark.parametrize('kind', [pl.Float64, pl.Int32, pl.String])
def test_first_values_of_a_feature_are_drift_and_can_be_written_down(kind):
    never = PAST.with_columns(late=pl.lit(None, kind))
    value = pl.Series('late', ['7']).cast(kind)
    days = PAST_DAY.astype(np.int64)
    for share in (1.0, 0.5):
        come = make_rows(400, 3).with_columns(
            late=pl.when(pl.int_range(400) < 400 * share).then(pl.lit(value[0], kind))
        )
        told = {each['feature']: each for each in diagnose_evening(never, days, come)}
        assert told['late']['direction'] == 'first values' and told['late']['amount'] == share
        assert json.loads(json.dumps([*told.values()], allow_nan=False)) == [*told.values()]
    assert 'late' not in {each['feature'] for each in diagnose_evening(never, days, never)}


def test_a_feature_that_is_dark_is_written_down_as_json():
    dark = make_rows(400, 3).with_columns(wind=pl.lit(None, pl.Float64))
    told = diagnose_evening(PAST, PAST_DAY.astype(np.int64), dark)
    assert [each['direction'] for each in told] == ['missing']
    json.dumps(told, allow_nan=False)
