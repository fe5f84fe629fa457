"""Every number of a flight once more, from the raw files by plain arithmetic

No line of mlref's features is used.
"""

import os
import zipfile
from datetime import UTC, datetime
from functools import cache
from zoneinfo import ZoneInfo

import numpy as np
import polars as pl
import pytest

from mlref.contracts import validate
from mlref.core import LAST_MINUTE
from mlref.flights.events import raw_folder, read_year
from mlref.flights.on_demand import CARRIERS
from mlref.flights.task import flights_task
from mlref.training_set import training_set

RAW, DEEP, NEVER = raw_folder(), os.environ.get('MLREF_DEEP') == '1', 2**40
ELSEWHERE = {
    'SJU': 'America/Puerto_Rico',
    'BQN': 'America/Puerto_Rico',
    'PSE': 'America/Puerto_Rico',
    'STT': 'America/St_Thomas',
}
HOLIDAYS = [
    datetime(2013, *d)
    for d in (
        (1, 1),
        (1, 21),
        (2, 18),
        (5, 27),
        (7, 4),
        (9, 2),
        (10, 14),
        (11, 11),
        (11, 28),
        (12, 25),
    )
] + [datetime(2014, 1, 1)]
# clocks, storms, ends of the year
HARD = (
    '2013-03-09',
    '2013-03-10',
    '2013-11-02',
    '2013-11-03',
    '2013-02-08',
    '2013-02-09',
    '2013-07-01',
    '2013-07-02',
    '2013-01-01',
    '2013-12-31',
)


def rows(name):
    "One raw file as columns of text"
    text = (
        zipfile.ZipFile(RAW / f'{name}.csv.zip').read(f'{name}.csv')
        if name == 'flights'
        else (RAW / f'{name}.csv').read_bytes()
    )
    return {c.name: c.to_list() for c in pl.read_csv(text, infer_schema=False).fill_null('NA')}


@cache
def zone(name):
    return ZoneInfo(name)


@cache
def offset(name, hour):
    return int(datetime.fromtimestamp(hour * 3600, zone(name)).utcoffset().total_seconds()) // 60


@cache
def hour(*local):
    return int(datetime(*map(int, local), tzinfo=zone('America/New_York')).timestamp()) // 60


@cache
def date(*local):
    return datetime(*map(int, local))


def number(text):
    return np.nan if text == 'NA' else float(text)


def clock(text):
    return int(text) // 100 * 60 + int(text) % 100


def next_time(after, at, name):
    "The first minute from `after` on when a clock of the zone shows `at`"
    here = offset(name, after // 60)
    then = after + (at - after - here) % 1440
    turned = then + here - offset(name, then // 60)
    # one flight of 9 March lands at 2:03, a minute that was left out: its clock had not been turned
    return turned if turned >= after else then


class Raw:
    "The year as arrays: one place per flight; NEVER for what did not happen"

    def __init__(self):
        f, air = rows('flights'), rows('airports')
        zones = {**dict(zip(air['faa'], air['tzone'], strict=True)), **ELSEWHERE}
        there = [zones[d] for d in f['dest']]

        def ints(name):
            return np.array(f[name], dtype='U4').astype(np.int64)

        self.date = list(map(date, f['year'], f['month'], f['day']))
        self.hour = ints('hour')
        self.start = self.hour * 60 + ints('minute')
        self.sched = np.array(list(map(hour, f['year'], f['month'], f['day'], f['hour']))) + ints(
            'minute'
        )
        self.dep, self.arr, self.air = (
            np.array([number(x) for x in f[c]]) for c in ('dep_delay', 'arr_delay', 'air_time')
        )
        self.left = np.array(
            [
                NEVER if np.isnan(d) else s + int(d)
                for s, d in zip(self.sched.tolist(), self.dep, strict=True)
            ]
        )
        # the arrival delay has no part in it
        self.landed = np.array(
            [
                NEVER if np.isnan(a) else next_time(left + int(a), clock(c), z)
                for left, a, c, z in zip(
                    self.left.tolist(), self.air, f['arr_time'], there, strict=True
                )
            ]
        )
        self.dur = np.array(
            [
                next_time(s, clock(c), z) - s
                for s, c, z in zip(self.sched.tolist(), f['sched_arr_time'], there, strict=True)
            ]
        )
        self.over, self.late = (
            np.clip(self.air - self.dur, -120, 60),
            np.where(np.isnan(self.arr), np.nan, self.arr > 15),
        )
        self.dist = ints('distance')
        self.is_ = {c: np.array(f[c]) for c in ('carrier', 'origin', 'dest', 'tailnum', 'flight')}
        self.stamp = f['time_hour']
        self.id = np.array(
            [
                f'{c}{n}-{o}-{s}'
                for c, n, o, s in zip(
                    f['carrier'], f['flight'], f['origin'], self.sched, strict=True
                )
            ]
        )
        self.dests = {d: i for i, d in enumerate(sorted({*air['faa'], *ELSEWHERE}), 1)}
        p = rows('planes')
        self.plane = {
            t: (number(y), number(s))
            for t, y, s in zip(p['tailnum'], p['year'], p['seats'], strict=True)
        }
        w = rows('weather')
        self.gauges = (
            'temp',
            'dewp',
            'humid',
            'wind_dir',
            'wind_speed',
            'wind_gust',
            'precip',
            'pressure',
            'visib',
        )
        self.weather = {
            (
                o,
                int(datetime.fromisoformat(t).replace(tzinfo=UTC).timestamp()) // 60,
            ): dict(zip(self.gauges, map(number, v), strict=True))
            # one row says 1,048 mph
            for o, t, *v in zip(
                w['origin'],
                (t.rstrip('Z') for t in w['time_hour']),
                *(w[g] for g in self.gauges),
                strict=True,
            )
            if not number(v[4]) > 150
        }


def mean(x):
    return float(x.sum()) / len(x) if len(x) else np.nan


def sky(r, origin, t):
    "The newest hour of weather known at t, if it became known in the last six hours"
    return next(
        (w for k in range(361) if (t - k) % 60 == 0 and (w := r.weather.get((origin, t - k - 60)))),
        dict.fromkeys(r.gauges, np.nan),
    )


def alike(r, at, own, *columns):
    "Those of the flights that are of the same place, carrier, ..."
    if not columns:
        return at
    return at[np.logical_and.reduce([r.is_[c][at] == own[c] for c in columns])]


def been(at, when, T, w):
    "Those of the flights that did it in the last w minutes"
    return at[(when[at] > T - w) & (when[at] <= T)]


def lately(r, i, here, name, T):
    "Who left and who landed in the last hours at a place"
    out = {}
    for w in (60, 180, 360, 1440):
        left, landed = been(here, r.left, T, w), been(here, r.landed, T, w)
        out |= {
            f'{name}_dep_delay_{w}m': mean(np.clip(r.dep[left], -30, 180)),
            f'{name}_dep_n_{w}m': len(left),
            f'{name}_arr_delay_{w}m': mean(np.clip(r.arr[landed], -30, 180)),
            f'{name}_arr_late_{w}m': mean(r.late[landed]),
            f'{name}_arr_over_{w}m': mean(r.over[landed]),
        }
        if name == 'dest':
            out[f'dest_spare_{w}m'] = r.dur[i] - mean(r.air[landed])
    return out


def due_and_planned(r, here, name, T):
    "Who should have left, and who is to leave"
    due = here[(r.sched[here] <= T) & (T < r.sched[here] + 360) & (r.left[here] > T)]
    out = {
        f'{name}_overdue_sum_flights_0m': len(due),
        f'{name}_overdue_sum_sched_0m': (T - r.sched[due]).sum(),
    }
    sched = r.sched[here]
    for n, lo, hi in (
        ('plan_n_60m', T + 90, T + 150),
        ('plan_past_n_180m', T - 180, T),
        ('plan_next_n_120m', T, T + 120),
        ('plan_later_n_120m', T + 120, T + 240),
        ('plan_day_n_1440m', T - 720, T + 720),
    ):
        out[f'{name}_{n}'] = int(((sched > lo) & (sched <= hi)).sum())
    return out


def used_to(r, i, at, name, T):
    "How late the same flight, route or hour of the day used to land"
    out = {}
    for w in (1440, 20160, 86400):
        landed = been(at, r.landed, T, w)
        out |= {
            f'{name}_arr_delay_{w}m': mean(np.clip(r.arr[landed], -30, 180)),
            f'{name}_arr_late_{w}m': mean(r.late[landed]),
        }
        if name == 'route':
            out[f'route_spare_{w}m'] = r.dur[i] - mean(r.air[landed])
    return out


PLACES = {
    'all': (),
    'origin': ('origin',),
    'carrier': ('carrier',),
    'dest': ('dest',),
    'oc': ('origin', 'carrier'),
}


def vector(r, i, ahead=120):
    "What the pages say is known of flight i two hours before it is to leave"
    T, out, own = r.sched[i] - ahead, {}, {c: v[i] for c, v in r.is_.items()}
    near = np.flatnonzero((r.sched > T - 5 * 1440) & (r.sched <= T + 720))
    far = np.flatnonzero((r.sched > T - 63 * 1440) & (r.sched <= T))
    for name, columns in PLACES.items():
        here = alike(r, near, own, *columns)
        out |= lately(r, i, here, name, T) | due_and_planned(r, here, name, T)
    pair = alike(r, far, own, 'origin', 'dest')
    past = {
        'flight': alike(r, far, own, 'carrier', 'flight'),
        'route': alike(r, far, own, 'carrier', 'origin', 'dest'),
        'slot': pair[r.hour[pair] == r.hour[i]],
    }
    for name, at in past.items():
        out |= used_to(r, i, at, name, T)
    now, before = sky(r, own['origin'], T), sky(r, own['origin'], T - 180)
    out |= {f'weather_{g}': now[g] for g in r.gauges}
    out |= {f'weather3_{g}': now[g] - before[g] for g in ('wind_speed', 'pressure', 'visib')}
    return out | schedule(r, i, own) | aircraft(r, i, T, near, own)


def schedule(r, i, own):
    away = min(((r.date[i] - h).days for h in HOLIDAYS), key=abs)
    year, seats = r.plane.get(own['tailnum'], (np.nan, np.nan))
    return dict(
        carrier=CARRIERS.index(own['carrier']) + 1,
        origin=('EWR', 'JFK', 'LGA').index(own['origin']) + 1,
        dest=r.dests[own['dest']],
        weekday=r.date[i].isoweekday(),
        start=r.start[i],
        end=(r.start[i] + r.dur[i]) % 1440,
        holiday=max(-7, min(7, away)),
        duration=r.dur[i],
        distance=r.dist[i],
        headwind=r.dur[i] - r.dist[i] / 7.5,
        plane_year=year,
        plane_seats=seats,
    )


def aircraft(r, i, T, near, own):
    mine = near[(r.is_['tailnum'][near] == own['tailnum']) & (own['tailnum'] != 'NA')]
    out = {}
    for what, when, delay in (('left', r.left, r.dep), ('landed', r.landed, r.arr)):
        known = [(when[j], r.sched[j], delay[j]) for j in mine if when[j] <= T]
        t, _, d = max(known, default=(-NEVER, 0, np.nan))
        out |= {
            f'tail_{what}_age': T - t if T - t < 4320 else np.nan,
            f'tail_{what}_delay': d if T - t < 1440 else np.nan,
        }
    last = max(
        (r.sched[j] for j in mine if r.sched[i] - 1440 < r.sched[j] < r.sched[i]), default=None
    )
    if last is None:
        return out | dict.fromkeys(
            (
                'prev_gap',
                'prev_so_far',
                'prev_has_left',
                'prev_slack',
                'prev_landed_delay',
                'prev_duration',
            ),
            np.nan,
        )
    # 31 times an aircraft is to leave twice in one minute
    legs = [j for j in mine if r.sched[j] == last]
    dur, gap = max(r.dur[j] for j in legs), r.sched[i] - last
    gone, came = (
        [(when[j], delay[j]) for j in legs if when[j] <= T]
        for when, delay in ((r.left, r.dep), (r.landed, r.arr))
    )
    so_far = max(gone)[1] if gone else max(T - last, 0)
    return out | dict(
        prev_gap=gap,
        prev_so_far=min(so_far, 600),
        prev_has_left=bool(gone),
        prev_slack=gap - 2 * dur - so_far,
        prev_landed_delay=max(came)[1] if came else np.nan,
        prev_duration=dur,
    )


@pytest.fixture(scope='module')
def raw():
    return Raw()


@pytest.fixture(scope='module')
def made():
    task = flights_task()
    return training_set(validate(read_year(RAW), task.contract).good, task, 0, LAST_MINUTE)


def drawn(raw, n, seed=0):
    "Flights of any day, and as many of the days on which something is odd"
    g, day = np.random.default_rng(seed), np.array([f'{d:%F}' for d in raw.date])
    return np.r_[
        g.choice(len(day), n - n // 2, False),
        g.choice(np.flatnonzero(np.isin(day, HARD)), n // 2, False),
    ]


def test_clocks_and_delays_tell_the_same_minutes(raw):
    "Landing by the destination's clock, after so long in the air, is landing by plan and delay"
    came = raw.landed < NEVER
    assert (
        came.sum() == 327_346 and (raw.landed[came] == (raw.sched + raw.dur + raw.arr)[came]).all()
    )
    assert all(
        s[:13] == f'{datetime.fromtimestamp(t * 60, UTC):%FT%H}'
        for s, t in zip(raw.stamp, raw.sched.tolist(), strict=True)
    )


def same(a, b):
    return a == b or np.isnan(a) and np.isnan(b)


def test_every_number_of_drawn_flights_is_what_plain_arithmetic_gives(raw, made):
    at, differ = {each: k for k, each in enumerate(made.ids)}, {}
    for i in drawn(raw, 3000 if DEEP else 60):
        want, k = vector(raw, i), at[raw.id[i]]
        assert (made.cutoff[k], made.label_time[k]) == (
            raw.sched[i] - 120,
            raw.landed[i] if raw.landed[i] < NEVER else -1,
        )
        for n, x in zip(made.names, made.X[k], strict=True):
            if not same(x, np.float32(want[n])):
                differ.setdefault(n, []).append((raw.id[i], float(x), float(want[n])))
    assert differ == {}


def test_a_minute_more_is_seen(raw, made):
    "A minute later something else is known, in every family of columns that looks at the clock"
    late = {
        n
        for i in drawn(raw, 60)
        for a, b in [(vector(raw, i), vector(raw, i, 119))]
        for n in made.names
        if not same(np.float32(a[n]), np.float32(b[n]))
    }
    assert {
        f
        for f in (
            '_dep_delay_',
            '_arr_delay_',
            '_arr_late_',
            '_arr_over_',
            '_spare_',
            '_overdue_',
            '_plan_',
            'tail_',
        )
        if not any(f in n for n in late)
    } == set()
