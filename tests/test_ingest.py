"""Events in once: writers and servers killed, disks full, files cut, readers beside the writer"""

import contextlib
import json
import os
import pickle
import random
import signal
import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from mlref.consumer import send_events
from mlref.core import MlrefError, digest, parse_time
from mlref.dead_letters import Outage
from mlref.events import corrupt_messages, disturb_delivery, encode_events, events_between
from mlref.flights.contract import flight_rules
from mlref.flights.events import FLIGHT_SCHEMA, MISSING_ZONES, raw_folder, read_raw, read_year
from mlref.ingest import ingest, next_offset
from mlref.lake import Lake, events_as_of
from mlref.log import LocalLog
from mlref.log_position import check_log
from mlref.results import result_row, write_results
from mlref.snapshots import clear_snapshots, open_snapshot, pin_snapshot, publish_snapshot
from programs import MLREF
from server_fixture import deliver_body

DEEP = os.environ.get('MLREF_DEEP') == '1'
CONTRACT = flight_rules(read_raw(raw_folder(), 'airports')['faa'].to_list() + list(MISSING_ZONES))
INGEST = [*MLREF, 'ingest']
CHILD = """
import os, signal, sys, threading, time
from pathlib import Path
from mlref.flights.contract import flight_rules
from mlref.flights.events import FLIGHT_SCHEMA, MISSING_ZONES, raw_folder, read_raw
from mlref.ingest import ingest
from mlref.lake import Lake
from mlref.log import LocalLog
folder, when, at, delay = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]), float(sys.argv[4])
def die(after=0):
    time.sleep(after)
    os.kill(os.getpid(), signal.SIGKILL)
class Dies:
    "A connection that kills its process at the n-th commit"
    def __init__(self, con): self.con, self.n = con, 0
    def __getattr__(self, name): return getattr(self.con, name)
    def commit(self):
        self.n += 1
        if self.n == at and when == 'before': die()
        if self.n == at and when == 'during':
            threading.Thread(target=die, args=(delay,), daemon=True).start()
        self.con.commit()
        if self.n == at and when == 'after': die()
        if self.n == at and when == 'during': time.sleep(1)
lake = Lake(folder / 'lake.duckdb', FLIGHT_SCHEMA)
lake.con = Dies(lake.con)
log = LocalLog(folder / 'log', readonly=True)
rules = flight_rules(read_raw(raw_folder(), 'airports')['faa'].to_list() + list(MISSING_ZONES))
for p in (0, 1): ingest(lake, log, 'events', rules, 40, p)
"""


@pytest.fixture(scope='module')
def part():
    return events_between(
        read_year(raw_folder()), parse_time('2013-02-11'), parse_time('2013-02-14')
    )


def storm(folder, part):
    "Two partitions with repeats, late, broken and impossible messages; messages in all, ids"
    log = LocalLog(folder / 'log')
    send_events(
        log, 'events', disturb_delivery(part, seed=5, late=0.1, twice=0.1), FLIGHT_SCHEMA, 2
    )
    for p in (0, 1):
        log.append(
            'events',
            corrupt_messages(encode_events(part.head(60), FLIGHT_SCHEMA), seed=p, share=0.3)[0],
            p,
        )
    n = log.end('events', 0) + log.end('events', 1)
    log.close()
    return n


def books(path):
    "messages read, events, repeated, dead, doubled ids, doubled positions"
    lake = Lake(path, FLIGHT_SCHEMA)
    r = lake.sql(
        """
        with placed as (
            select topic, part, off from events
            union all select topic, part, off from dead_letters
        )
        select
            (select coalesce(sum(next), 0) from offsets)::bigint as read,
            (select count(*) from events) as rows,
            (select coalesce(sum(repeated), 0) from commits)::bigint as again,
            (select count(*) from dead_letters) as dead,
            (select count(*) - count(distinct event_id) from events) as twice,
            (select count(*) - count(distinct (topic, part, off)) from placed) as places
        """
    ).row(0)
    lake.close()
    return r


def test_killed_before_during_and_after_commits_rows_in_are_rows_out_and_dead_letters(
    part, tmp_path
):
    want = 120 if DEEP else 5
    n = storm(tmp_path, part)
    whole = Lake(tmp_path / 'whole.duckdb', FLIGHT_SCHEMA)
    log = LocalLog(tmp_path / 'log', readonly=True)
    for p in (0, 1):
        ingest(whole, log, 'events', CONTRACT, part=p)
    good = digest(events_as_of(whole).sort('event_id'))
    whole.close()
    log.close()
    g, points, lost, doubled = random.Random(7), {'before': 0, 'during': 0, 'after': 0}, 0, 0
    while sum(points.values()) < want:
        when = ('before', 'during', 'after')[sum(points.values()) % 3]
        r = subprocess.run(
            [
                sys.executable,
                '-c',
                CHILD,
                tmp_path,
                when,
                str(g.randint(1, 3)),
                str(g.uniform(0, 0.012)),
            ],
            capture_output=True,
            text=True,
        )
        assert r.returncode in (0, -signal.SIGKILL), r.stderr
        points[when] += r.returncode == -signal.SIGKILL
        read, rows, again, dead, twice, places = books(tmp_path / 'lake.duckdb')
        lost += abs(read - rows - again - dead)
        doubled += twice + places
        # all read: a new lake
        if r.returncode == 0 or read > n - 200:
            (tmp_path / 'lake.duckdb').rename(tmp_path / f'old{sum(points.values())}.duckdb')
    assert (
        subprocess.run([sys.executable, '-c', CHILD, tmp_path, 'never', '0', '0']).returncode == 0
    )
    read, rows, again, dead, twice, places = books(tmp_path / 'lake.duckdb')
    lost += abs(n - rows - again - dead)
    doubled += twice + places
    lake = Lake(tmp_path / 'lake.duckdb', FLIGHT_SCHEMA)
    assert digest(events_as_of(lake).sort('event_id')) == good
    lake.close()
    if DEEP:
        out = [result_row('crash points', sum(points.values()), '', '>= 100', n)] + [
            result_row(f'killed {k} a commit', v, '', '> 0') for k, v in points.items()
        ]
        write_results(
            Path(__file__).parent.parent / 'reports' / 'results',
            'crashes',
            'MLREF_DEEP=1 pytest tests/test_ingest.py',
            out
            + [
                result_row('messages lost', lost, '', '== 0', n),
                result_row('messages doubled', doubled, '', '== 0', n),
            ],
        )
    assert (lost, doubled) == (0, 0)


def test_ingest_follows_stops_gracefully_and_goes_on(part, tmp_path):
    log = LocalLog(tmp_path / 'log')
    send_events(log, 'events', part.head(3000), FLIGHT_SCHEMA, 2)
    cmd = [
        *INGEST,
        '--log',
        tmp_path / 'log',
        '--lake',
        tmp_path / 'l.duckdb',
        '--batch',
        '500',
        '--every',
        '.05',
        '--snapshots',
        tmp_path / 'shots',
    ]
    p = subprocess.Popen(cmd, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    while 'snapshot' not in p.stdout.readline():
        assert p.poll() is None
    assert open_snapshot(tmp_path / 'shots').sql('select count(*) as n from events')['n'][0] == 3000
    send_events(
        log, 'events', part[3000:], FLIGHT_SCHEMA, 3
    )  # while it runs, with a partition that is new
    while 'snapshot' not in p.stdout.readline():
        assert p.poll() is None
    p.send_signal(signal.SIGTERM)
    rest = p.stdout.read()
    assert p.wait(20) == 0 and 'stopped:' in rest
    p = subprocess.Popen(cmd, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    p.stdout.readline()
    time.sleep(0.3)
    p.kill()
    p.wait()
    r = subprocess.run([*cmd, '--once'], capture_output=True, text=True)
    assert r.returncode == 0, r.stderr
    lake = Lake(tmp_path / 'l.duckdb', FLIGHT_SCHEMA)
    assert (
        events_as_of(lake).height + lake.sql('select count(*) as n from dead_letters')['n'][0]
        == part.height
    )
    assert sum(next_offset(lake, 'events', k) for k in range(3)) == part.height
    r = subprocess.run(cmd, capture_output=True, text=True)
    lake.close()
    assert (
        r.returncode == 1
        and f'process {os.getpid()} holds it' in r.stderr
        and len(r.stderr.strip().splitlines()) == 1
    )


SERVER = """
import sys
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from mlref.event_route import post_events
from mlref.flights.task import flights_task
from mlref.group_commit import GroupCommit
from mlref.log import LocalLog
from mlref.request_fields import make_served_task
from mlref.requests import Route
from mlref.serve import Application, serve
log = LocalLog(Path(sys.argv[1]))
server = SimpleNamespace(
    task=make_served_task(flights_task()), events=GroupCommit(log), event_file=log
)
serve(Application([Route('/events', partial(post_events, server), 'POST')]), 0)
"""


def post(url, body):
    from urllib.error import HTTPError
    from urllib.request import Request, urlopen

    headers = {'content-type': 'application/json'}
    try:
        return 200, json.load(urlopen(Request(url + '/events', body, headers), timeout=30))
    except HTTPError as e:
        return e.code, json.load(e)


def test_events_over_http_are_on_disk_when_answered(part, tmp_path):
    p = subprocess.Popen(
        [sys.executable, '-c', SERVER, tmp_path / 'log'], stdout=subprocess.PIPE, text=True
    )
    url = p.stdout.readline().split(' at ')[1].strip()
    msgs = encode_events(part.head(2000), FLIGHT_SCHEMA)
    status, accepted = post(url, b'\n'.join(msgs[:500]))
    assert (status, len(accepted.pop('log'))) == (200, 32)
    assert accepted == {'accepted': 500, 'topic': 'events', 'offset': 0}
    assert post(url, b'[' + b','.join(msgs[500:600]) + b']')[1]['offset'] == 500
    for bad, says in (
        (b'', 'at least one'),
        (b'[{]', 'JSON list'),
        (b'[1]', 'event 1 of 1 as a JSON object'),
        (msgs[0] + b'\n{"sched": "soon"}', 'line 2 of 2'),
        (b'\xff', 'line 1 of 1'),
        (b'null', 'as a JSON object'),
    ):
        code, said = post(url, bad)
        expected = 400 if says in ('at least one', 'JSON list') else 422
        assert code == expected and says in said['error'] and '\n' not in said['error'], said
    for i in range(600, 2000, 100):
        assert post(url, b'\n'.join(msgs[i : i + 100]))[1]['offset'] == i
    p.kill()
    p.wait()
    log = LocalLog(tmp_path / 'log', readonly=True)
    assert [json.loads(m) for m in log.read('events', 0, 10**4)] == [json.loads(m) for m in msgs]
    r = subprocess.run(
        [*INGEST, '--log', tmp_path / 'log', '--lake', tmp_path / 'l.duckdb', '--once'],
        capture_output=True,
        text=True,
    )
    assert r.returncode == 0, r.stderr
    assert events_as_of(Lake(tmp_path / 'l.duckdb', FLIGHT_SCHEMA)).height == 2000


def test_as_of_an_old_commit_the_training_set_is_what_it_was(part, tmp_path):
    log, lake = LocalLog(tmp_path / 'log'), Lake(tmp_path / 'l.duckdb', FLIGHT_SCHEMA)
    send_events(log, 'events', part.head(4000), FLIGHT_SCHEMA)
    ingest(lake, log, 'events', CONTRACT)
    n = lake.sql('select max(commit_id) as n from commits')['n'][0]
    before = digest(events_as_of(lake))
    shot = publish_snapshot(lake, tmp_path / 'shots')
    send_events(log, 'events', disturb_delivery(part, seed=1, late=0.2, twice=0.2), FLIGHT_SCHEMA)
    ingest(lake, log, 'events', CONTRACT, 700)
    assert digest(events_as_of(lake, n)) == before and digest(events_as_of(lake)) != before
    publish_snapshot(lake, tmp_path / 'shots')
    assert (
        digest(open_snapshot(tmp_path / 'shots').events(FLIGHT_SCHEMA, n))
        == digest(open_snapshot(tmp_path / 'shots', shot.name).events(FLIGHT_SCHEMA))
        == before
    )


READ = """
import sys, time
from pathlib import Path
from mlref.snapshots import open_snapshot
seen, end = [], time.time() + float(sys.argv[2])
while time.time() < end:
    s = open_snapshot(Path(sys.argv[1]))
    r = s.sql('''
        select
            (select count(*) from events) + (select count(*) from dead_letters)
                + (select sum(repeated) from commits) as a,
            (select sum(messages) from commits) as b,
            (select max(commit_id) from commits) as c
    ''').row(0)
    assert r[0] == r[1] and r[2] == s.commit, r
    seen.append(s.commit)
assert seen == sorted(seen); print(len(set(seen)))
"""


def test_readers_in_other_processes_see_whole_snapshots_while_the_writer_writes(part, tmp_path):
    log, lake = LocalLog(tmp_path / 'log'), Lake(tmp_path / 'l.duckdb', FLIGHT_SCHEMA)
    log.append('events', encode_events(part.head(200), FLIGHT_SCHEMA))
    ingest(lake, log, 'events', CONTRACT)
    publish_snapshot(lake, tmp_path / 's')
    readers = [
        subprocess.Popen(
            [sys.executable, '-c', READ, tmp_path / 's', '4'],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for _ in range(2)
    ]
    at = 200
    while any(p.poll() is None for p in readers):
        if at < part.height:
            log.append('events', encode_events(part[at : at + 50], FLIGHT_SCHEMA))
            at += 50
            ingest(lake, log, 'events', CONTRACT)
            publish_snapshot(lake, tmp_path / 's')
            clear_snapshots(tmp_path / 's', 1)
        else:
            time.sleep(0.05)
    for p in readers:
        out, err = p.communicate()
        assert p.returncode == 0 and int(out) > 1, err


HOLD = """
import sys
from pathlib import Path
from mlref.core import digest
from mlref.flights.events import FLIGHT_SCHEMA
from mlref.snapshots import open_snapshot
s = open_snapshot(Path(sys.argv[1])); print(s.name, flush=True)
for line in sys.stdin:
    offsets = s.sql('select count(*) as n from offsets')['n'][0]
    print(digest(s.events(FLIGHT_SCHEMA)), offsets, flush=True)
"""


def publish(lake, log, part):
    log.append('events', encode_events(part, FLIGHT_SCHEMA))
    ingest(lake, log, 'events', CONTRACT)
    return publish_snapshot(lake, lake.path.parent / 's')


def parts(at):
    return {p.stem for p in (at / 's' / 'parts').iterdir()}


def test_old_snapshots_go_but_not_one_that_a_process_has_open_or_that_is_pinned(part, tmp_path):
    log, lake = LocalLog(tmp_path / 'log'), Lake(tmp_path / 'l.duckdb', FLIGHT_SCHEMA)
    at = tmp_path / 's'
    first = publish(lake, log, part[:200])
    want = digest(events_as_of(lake))
    p = subprocess.Popen(
        [sys.executable, '-c', HOLD, at], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert p.stdout.readline().strip() == first.name

    def ask():
        p.stdin.write('?\n')
        p.stdin.flush()
        return p.stdout.readline().split()

    shots = [publish(lake, log, part[i : i + 200]) for i in range(200, 1400, 200)]
    pinned = shots[1].name
    pin_snapshot(open_snapshot(at, pinned), 'model-1')
    assert clear_snapshots(at, 2) == [f.name for f in (shots[0], *shots[2:4])]
    assert ask() == [want, '1'] and {f.name for f in at.glob('*.json')} == {
        first.name,
        pinned,
        shots[4].name,
        shots[5].name,
    }
    p.kill()
    p.wait()  # a reader that dies holds nothing
    assert clear_snapshots(at, 2) == [first.name] and clear_snapshots(at, 2) == []
    (at / 'pins' / 'model-1').unlink()
    assert clear_snapshots(at, 1) == [pinned, shots[4].name]
    s = open_snapshot(at)
    assert (
        parts(tmp_path) == {f for fs in s.tables.values() for f in fs}
        and digest(s.events(FLIGHT_SCHEMA, 1)) == want
    )


CLEARS = """
import os, signal, sys
from pathlib import Path
from mlref.snapshots import clear_snapshots
unlink, n = Path.unlink, int(sys.argv[2])
def dies(self, *a, **k):
    global n
    if n == 0: os.kill(os.getpid(), signal.SIGKILL)
    n -= 1; return unlink(self, *a, **k)
Path.unlink = dies
clear_snapshots(Path(sys.argv[1]), 1)
"""


@pytest.mark.parametrize('n', [0, 1, 2, 5])
def test_killed_while_it_clears_every_snapshot_that_is_listed_is_whole(n, part, tmp_path):
    log, lake = LocalLog(tmp_path / 'log'), Lake(tmp_path / 'l.duckdb', FLIGHT_SCHEMA)
    at = tmp_path / 's'
    for i in range(0, 600, 150):
        publish(lake, log, part[i : i + 150])
    assert subprocess.run([sys.executable, '-c', CLEARS, at, str(n)]).returncode == -signal.SIGKILL
    names = [f.name for f in at.glob('*.json')]
    assert len(names) == 4 - min(n, 3)
    for name in names:
        assert open_snapshot(at, name).events(FLIGHT_SCHEMA).height > 0
    clear_snapshots(at, 1)
    s = open_snapshot(at)
    assert parts(tmp_path) == {f for fs in s.tables.values() for f in fs} and s.events(
        FLIGHT_SCHEMA
    ).equals(events_as_of(lake))


def test_a_snapshot_sent_elsewhere_is_held_there_too(part, tmp_path):
    log, lake = LocalLog(tmp_path / 'log'), Lake(tmp_path / 'l.duckdb', FLIGHT_SCHEMA)
    publish(lake, log, part[:200])
    s = open_snapshot(tmp_path / 's')
    there = pickle.loads(pickle.dumps(s))
    assert there == s and there.events(FLIGHT_SCHEMA).equals(s.events(FLIGHT_SCHEMA))
    name = s.name
    del s
    publish(lake, log, part[200:300])
    assert clear_snapshots(tmp_path / 's', 1) == [] and there.events(FLIGHT_SCHEMA).equals(
        events_as_of(lake, 1)
    )
    del there
    assert clear_snapshots(tmp_path / 's', 1) == [name]


READER = """
import sys
from pathlib import Path
from mlref.consumer import Consumer, assigned_partitions
from mlref.log import LocalLog
from mlref.log_position import LogPosition
log, want = LocalLog(Path(sys.argv[1]), readonly=True), int(sys.argv[3])
mine = assigned_partitions(range(4), int(sys.argv[2]), 2)
c = Consumer(log, 'many', dict.fromkeys(mine, LogPosition()))
n = 0
while n < want:
    if b := c.poll(37):
        print(*(m.decode() for m in b.messages), sep='\\n', flush=True)
        n += len(b.messages)
        c.done(b)
"""


def test_consumers_in_processes_read_each_message_once_while_it_is_written(tmp_path):
    log = LocalLog(tmp_path / 'log')
    [log.append('many', [b'%d' % p], p) for p in range(4)]
    readers = [
        subprocess.Popen(
            [sys.executable, '-c', READER, tmp_path / 'log', str(i), '1002'],
            stdout=subprocess.PIPE,
            text=True,
        )
        for i in (0, 1)
    ]
    for k in range(1, 51):
        for p in range(4):
            log.append('many', [b'%d' % (p + 4 * (10 * (k - 1) + j + 1)) for j in range(10)], p)
    got = [int(x) for r in readers for x in r.communicate(timeout=60)[0].split()]
    assert sorted(got) == list(range(2004))


FULL = """
import resource, signal, sys
from pathlib import Path
from mlref.core import MlrefError
signal.signal(signal.SIGXFSZ, signal.SIG_IGN); f = Path(sys.argv[1]); limit = int(sys.argv[3])
if sys.argv[2] == 'log':
    from mlref.log import LocalLog
    log = LocalLog(f)
    log.append('t', [b'x' * 1000] * 10)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    try: log.append('t', [b'y' * 1000] * 5000); print('kept')
    except MlrefError as e: print(e)
else:
    import polars as pl
    from mlref.flights.events import FLIGHT_SCHEMA
    from mlref.lake import Lake, insert_rows
    from mlref.schema import TableSchema
    days = TableSchema('days', {'day': pl.Int64}, ('day',))
    tables = days, TableSchema('decisions', {'id': pl.String})
    lake = Lake(f, FLIGHT_SCHEMA, tables)
    insert_rows(lake, {'days': pl.DataFrame({'day': [1]})})
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    many = pl.DataFrame({'id': [str(i) * 100 for i in range(200_000)]})
    try: insert_rows(lake, {'decisions': many}); print('kept')
    except MlrefError as e: print(e)
"""


@pytest.mark.parametrize('what', ['log', 'lake'])
def test_a_full_disk_is_said_and_what_was_there_stays(what, tmp_path):
    at = tmp_path / ('log' if what == 'log' else 'l.duckdb')
    r = subprocess.run(
        [sys.executable, '-c', FULL, at, what, str(400_000)], capture_output=True, text=True
    )
    assert (
        'expected room' in r.stdout
        and 'nothing of this' in r.stdout
        and len(r.stdout.strip().splitlines()) == 1
    ), r.stdout + r.stderr
    if what == 'log':
        log = LocalLog(at)
        assert log.read('t', 0, 99) == [b'x' * 1000] * 10 and log.append('t', [b'z']) == 10
    else:
        lake = Lake(at, FLIGHT_SCHEMA)
        assert lake.sql(
            'select (select count(*) from days) as a, (select count(*) from decisions) as b'
        ).row(0) == (1, 0)


@pytest.fixture
def small(tmp_path):
    "A disk of 4 MB that is really full when it is"
    at = tmp_path / 'disk'
    at.mkdir()
    if subprocess.run(
        ['mount', '-t', 'tmpfs', '-o', 'size=4m', 'tmpfs', at], capture_output=True
    ).returncode:
        pytest.skip('expected to be allowed to mount a small disk, was not; run as root')
    yield at
    subprocess.run(['umount', '-l', at], check=True)


def fill(at):
    "Leave one page free"
    f = os.open(at / 'filler', os.O_CREAT | os.O_WRONLY)
    try:
        while True:
            os.write(f, b'x' * 4096)
    except OSError:
        os.ftruncate(f, os.lseek(f, 0, os.SEEK_CUR) - 4096)
    os.close(f)


def test_a_log_on_a_full_disk(small):
    log = LocalLog(small / 'log')
    log.append('t', [b'x' * 1000] * 10)
    with pytest.raises(
        MlrefError, match='expected room on the disk .* nothing of this batch was kept'
    ):
        log.append('t', [b'y' * 1000] * 9000)
    log.close()
    log = LocalLog(small / 'log')
    assert log.read('t', 0, 99) == [b'x' * 1000] * 10 and log.append('t', [b'z']) == 10


def test_events_over_http_when_the_disk_is_full(small, part):
    log = LocalLog(small / 'log')
    msgs = encode_events(part.head(100), FLIGHT_SCHEMA)
    many = b'\n'.join(encode_events(part.head(2000), FLIGHT_SCHEMA))
    deliver_body(log, FLIGHT_SCHEMA, b'\n'.join(msgs))
    fill(small)
    with pytest.raises(Outage, match='nothing of this batch was kept'):
        for _ in range(99):
            deliver_body(log, FLIGHT_SCHEMA, many)
    end = log.end('events')
    assert end % 2000 == 100 and log.read('events', 0, 100) == msgs
    (small / 'filler').unlink()
    assert deliver_body(log, FLIGHT_SCHEMA, msgs[0])['offset'] == end


def test_a_lake_on_a_full_disk_takes_nothing_of_a_batch_and_all_of_it_later(small, part, tmp_path):
    log, lake = LocalLog(tmp_path / 'log'), Lake(small / 'l.duckdb', FLIGHT_SCHEMA)
    log.append('events', encode_events(part.head(1000), FLIGHT_SCHEMA))
    ingest(lake, log, 'events', CONTRACT)
    lake.con.execute('checkpoint')
    fill(small)
    before = digest(events_as_of(lake))
    log.append('events', encode_events(part[1000:5000], FLIGHT_SCHEMA))
    with pytest.raises(
        MlrefError, match='expected room for .* nothing of this transaction was kept'
    ):
        ingest(lake, log, 'events', CONTRACT)
    with contextlib.suppress(Exception):  # the connection may be lost with the disk
        lake.close()
    (small / 'filler').unlink()
    lake = Lake(small / 'l.duckdb', FLIGHT_SCHEMA)
    assert (next_offset(lake, 'events'), digest(events_as_of(lake))) == (1000, before)
    ingest(lake, log, 'events', CONTRACT)
    lake.close()
    assert books(small / 'l.duckdb')[0] == 5000 and books(small / 'l.duckdb')[4:] == (0, 0)


def test_a_snapshot_on_a_full_disk_is_not_published_and_the_last_one_stays(small, part, tmp_path):
    log, lake = LocalLog(tmp_path / 'log'), Lake(tmp_path / 'l.duckdb', FLIGHT_SCHEMA)
    log.append('events', encode_events(part.head(500), FLIGHT_SCHEMA))
    ingest(lake, log, 'events', CONTRACT)
    publish_snapshot(lake, small / 's')
    before = open_snapshot(small / 's')
    fill(small)
    log.append('events', encode_events(part[500:4000], FLIGHT_SCHEMA))
    ingest(lake, log, 'events', CONTRACT)
    with pytest.raises(MlrefError, match='expected to write .* what was there is unchanged'):
        publish_snapshot(lake, small / 's')
    assert (
        open_snapshot(small / 's') == before
        and not [p for p in (small / 's').rglob('.*')]
        and before.events(FLIGHT_SCHEMA).height == events_as_of(lake, 1).height
    )
    (small / 'filler').unlink()
    publish_snapshot(lake, small / 's')
    assert open_snapshot(small / 's').events(FLIGHT_SCHEMA).equals(events_as_of(lake))


@pytest.mark.parametrize('what', [LocalLog, partial(Lake, schema=FLIGHT_SCHEMA)])
def test_a_store_that_cannot_be_begun_is_not_in_the_way_of_the_next_try(what, small):
    fill(small)
    with pytest.raises(MlrefError, match='could not open it'):
        what(small / 'new')
    (small / 'filler').unlink()
    what(small / 'new').close()


@pytest.mark.parametrize('cut', [0, 1000, 0.25, 0.5, -300_000, -1])
def test_a_lake_that_was_cut_off_is_refused_and_left_as_it_is(cut, part, tmp_path):
    log, lake = LocalLog(tmp_path / 'log'), Lake(tmp_path / 'l.duckdb', FLIGHT_SCHEMA)
    log.append('events', encode_events(part, FLIGHT_SCHEMA))
    ingest(lake, log, 'events', CONTRACT)
    lake.close()
    f = tmp_path / 'l.duckdb'
    n = f.stat().st_size
    os.truncate(f, int(n * cut) if isinstance(cut, float) else cut % n)
    left = f.read_bytes()
    with pytest.raises(MlrefError, match='(could not open it|it was cut off).*; restore it'):
        Lake(f, FLIGHT_SCHEMA)
    assert f.read_bytes() == left


def test_a_transaction_log_that_was_cut_off_loses_whole_commits_and_they_come_again(part, tmp_path):
    n = storm(tmp_path, part)
    r = subprocess.run([sys.executable, '-c', CHILD, tmp_path, 'after', '40', '0'])
    assert r.returncode == -signal.SIGKILL
    wal = tmp_path / 'lake.duckdb.wal'
    os.truncate(wal, wal.stat().st_size * 2 // 3)
    read, rows, again, dead, twice, places = books(tmp_path / 'lake.duckdb')
    assert 0 < read < n and (read, twice, places) == (rows + again + dead, 0, 0) and read % 40 == 0
    lake, log = (
        Lake(tmp_path / 'lake.duckdb', FLIGHT_SCHEMA),
        LocalLog(tmp_path / 'log', readonly=True),
    )
    [ingest(lake, log, 'events', CONTRACT, part=p) for p in (0, 1)]
    lake.close()
    read, rows, again, dead, twice, places = books(tmp_path / 'lake.duckdb')
    assert (read, twice, places) == (n, 0, 0) and read == rows + again + dead


@pytest.mark.parametrize(
    'what, says',
    [('manifest', 'cut off or altered'), ('current', 'it was cut off'), ('part', 'it is altered')],
)
def test_a_snapshot_that_was_cut_off_is_refused(what, says, part, tmp_path):
    log, lake = LocalLog(tmp_path / 'log'), Lake(tmp_path / 'l.duckdb', FLIGHT_SCHEMA)
    publish(lake, log, part[:200])
    at = tmp_path / 's'
    s = open_snapshot(at)
    f = {
        'manifest': at / s.name,
        'current': at / 'current',
        'part': at / 'parts' / f'{s.tables["events"][0]}.parquet',
    }[what]
    os.truncate(f, f.stat().st_size // 2 if what != 'current' else 5)
    with pytest.raises(MlrefError, match=says):
        open_snapshot(at)
    if what != 'part':
        with pytest.raises(MlrefError, match=says):
            publish(lake, log, part[200:300])


OWNER = """
import sys, time
from pathlib import Path
from mlref.log import LocalLog
log = LocalLog(Path(sys.argv[1])); db = log.file.env.open_db(b't/0')
with log.file.env.begin(write=True) as txn:
    txn.put(b'\\0' * 8, b'half', db=db)
    print('holds', flush=True)
    time.sleep(60)
"""
MANY = """
import sys
from pathlib import Path
from mlref.log import LocalLog
log = LocalLog(Path(sys.argv[1]))
for i in range(200): log.append('t', [f'{sys.argv[2]} {i}'.encode()] * 3)
"""


def test_a_log_locked_by_a_writer_that_dies_is_free_again_without_its_half_batch(tmp_path):
    LocalLog(tmp_path).close()
    p = subprocess.Popen([sys.executable, '-c', OWNER, tmp_path], stdout=subprocess.PIPE, text=True)
    assert p.stdout.readline()
    # it waits for its turn
    w = subprocess.Popen([sys.executable, '-c', MANY, tmp_path, 'a'])
    time.sleep(1)
    assert w.poll() is None
    assert LocalLog(tmp_path, readonly=True).end('t') == 0  # readers do not
    p.kill()
    p.wait()
    assert w.wait(30) == 0
    log = LocalLog(tmp_path, readonly=True)
    assert log.end('t') == 600 and log.read('t', 0, 3) == [b'a 0'] * 3


def test_two_writers_take_turns_batch_by_batch(tmp_path):
    both = [subprocess.Popen([sys.executable, '-c', MANY, tmp_path, x]) for x in 'ab']
    assert [p.wait(60) for p in both] == [0, 0]
    got = [m.decode() for m in LocalLog(tmp_path, readonly=True).read('t', 0, 9999)]
    assert all(got[i] == got[i + 1] == got[i + 2] for i in range(0, 1200, 3))
    assert all([m for m in got[::3] if m[0] == x] == [f'{x} {i}' for i in range(200)] for x in 'ab')


class LogMachine(RuleBasedStateMachine):
    "Whatever is done in whatever order, the log is the lists it was given"

    def __init__(self):
        super().__init__()
        self.dir = tempfile.TemporaryDirectory()
        self.log, self.model = LocalLog(self.dir.name), {}

    @rule(
        topic=st.sampled_from('ab'),
        part=st.integers(0, 2),
        messages=st.lists(st.binary(max_size=2000), max_size=20),
    )
    def append(self, topic, part, messages):
        have = self.model.setdefault((topic, part), [])
        assert self.log.append(topic, messages, part) == len(have)
        have += messages

    @rule(
        topic=st.sampled_from('ab'),
        part=st.integers(0, 2),
        start=st.integers(0, 60),
        limit=st.integers(1, 30),
    )
    def read(self, topic, part, start, limit):
        have = self.model.get((topic, part), [])
        if start > len(have):
            with pytest.raises(MlrefError, match='up to its end'):
                self.log.read(topic, start, limit, part)
            return
        assert self.log.read(topic, start, limit, part) == have[start : start + limit]

    @rule(topic=st.sampled_from('ab'), messages=st.lists(st.binary(), max_size=3))
    def refused(self, topic, messages):
        with pytest.raises(MlrefError):
            self.log.append(topic, [*messages, 'text'])

    @rule()
    def reopen(self):
        self.log.close()
        self.log = LocalLog(self.dir.name)

    @rule(topic=st.sampled_from('ab'), part=st.integers(0, 2))
    def abandoned(
        self,
        topic,
        part,  # a batch that did not come to its end
    ):
        db = self.log.file.env.open_db(f'{topic}/{part}'.encode())
        txn = self.log.file.env.begin(write=True)
        txn.put(b'\0' * 8, b'half', db=db, overwrite=False)
        txn.abort()

    @invariant()
    def ends(self):
        assert all(self.log.end(t, p) == len(m) for (t, p), m in self.model.items())

    def teardown(self):
        self.log.close()
        self.dir.cleanup()


TestLog = LogMachine.TestCase
TestLog.settings = settings(
    max_examples=200 if DEEP else 15, stateful_step_count=25, deadline=None, derandomize=not DEEP
)


def test_the_local_log_is_a_log(tmp_path):
    check_log(LocalLog(tmp_path), 't')
