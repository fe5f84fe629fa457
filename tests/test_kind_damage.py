"""Bytes that are no longer those that were written are refused by name, and end no process"""

import json
import os
import random
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import polars as pl
import pytest
import torch

from mlref.checked_files import read_checked_json, write_checked_json
from mlref.checkpoint import load_checkpoint, save_checkpoint
from mlref.core import MlrefError
from mlref.file_cache import cached_frame
from mlref.last_values import get_online_features, push
from mlref.lmdb_store import LmdbStore
from mlref.model import TorchPredictor, read_description, save_model
from mlref.networks import linear_net
from mlref.online import Facts, merge_facts
from mlref.outbox import list_set_aside
from mlref.records import DamagedRecord, RecordLayout, is_sealed, seal
from mlref.serving_state import publish_state, read_state, set_workers, wanted_workers
from mlref.sketches import count_rows, decode_sketch, encode_sketch, freeze_bins
from mlref.workspace import read_reference, write_reference

DEEP = os.environ.get('MLREF_DEEP') == '1'
LAST = RecordLayout('last/k', ('a', 'b'), True, 0, 'a' * 16, ttl=50)
SUMS = RecordLayout('sums/k', ('a',), False, 500, 'c' * 16)
KEYS = [f'key{i:03}' for i in range(120)]


def make(at, shards=1):
    "Last values, long and short sums, notes"
    store = LmdbStore(at, more=(LAST, SUMS), shards=shards)
    count = len(KEYS)
    rows = np.column_stack([np.arange(count) + 29.6, np.arange(count)])
    push(store, LAST.name, KEYS, np.full(count, 5), rows)
    for start in range(0, 300, 100):
        t = np.repeat(np.arange(start, start + 100), 3)
        facts = Facts(['long', 'key001', 'key002'] * 100, t, np.ones((300, 1), np.int64))
        store.write(merge_facts(store, SUMS, facts, start + 100))
    store.write({b'!position': b'123456', b'!newest': b'300'})
    store.close()


READ = """
import os, sys, json
from pathlib import Path
import numpy as np
sys.path.insert(0, sys.argv[1])
from test_kind_damage import KEYS, LAST, SUMS, read_all
from mlref.lmdb_store import LmdbStore
from mlref.core import MlrefError

def answer(folder, write):
    try:
        store = LmdbStore(Path(folder), readonly=not write, more=(LAST, SUMS))
        found = read_all(store)
        if write:
            store.write({b'!position': b'7', LAST.prefix + b'new': store.get(LAST.name, KEYS[0])})
        store.close()
        return found
    except MlrefError as error:
        return {'': str(error)}

for line in sys.stdin:
    folder, write = json.loads(line)
    end, begin = os.pipe()
    child = os.fork()
    if not child:
        os.write(begin, json.dumps(answer(folder, write)).encode())
        os._exit(0)
    os.close(begin)
    with os.fdopen(end, 'rb') as pipe:
        text = pipe.read()
    status = os.waitpid(child, 0)[1]
    print(json.dumps([os.WTERMSIG(status), json.loads(text) if text else {}]), flush=True)
"""


def read_all(store):
    "Whatever can be read, by name; a refusal is its sentence"
    found = {}

    def note(name, call):
        try:
            found[name] = call()
        except MlrefError as error:
            found[name] = str(error)

    for key in KEYS:
        note(key, lambda key=key: read_last(store, [key])[0])
    note('all', lambda: read_last(store, KEYS))
    for key in ('long', 'key001'):
        note('sum ' + key, lambda key=key: read_sums(store, key))
    note('position', store.position)
    note('clock', store.clock)
    return found


def read_last(store, keys):
    return get_online_features(store, [LAST.name], [keys], 10).values.tolist()


def read_sums(store, key):
    with store.snapshot() as lookup:
        record = lookup([SUMS.prefix + key.encode()])[0]
        from mlref.records import read_record

        rows = read_record(SUMS, key, record, [50, 150, 299])
        return [np.frombuffer(row, np.int64).tolist() for row in rows]


@pytest.fixture(scope='module')
def reader():
    "A process that reads a folder in a child of its own, so that an abort is seen"
    command = [sys.executable, '-c', READ, os.path.dirname(__file__)]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def read(folder, write=False):
        print(json.dumps([str(folder), write]), file=process.stdin, flush=True)
        return json.loads(process.stdout.readline())

    yield read
    process.stdin.close()
    process.wait()


def damaged_copy(whole, at, file, change):
    shutil.rmtree(at, ignore_errors=True)
    shutil.copytree(whole, at)
    path = at / file
    data = bytearray(path.read_bytes())
    change(data)
    path.write_bytes(data)
    return at


def judge(got, expected):
    "Names whose value is neither the old one nor a refusal; a value that is missing is none"
    wrong = []
    for name, value in got.items():
        if isinstance(value, str) or value == expected.get(name):
            continue
        wrong.append((name, value))
    return wrong


def test_no_flipped_bit_gives_another_value(reader, tmp_path):
    "Anywhere in the file: the value, or a sentence; a bit in a name can only lose that name"
    make(tmp_path / 'whole')
    _, expected = reader(tmp_path / 'whole')
    whole = (tmp_path / 'whole' / 'g1-0' / 'data.mdb').read_bytes()
    records = [each.start() for each in re.finditer(b'last/k/key', whole)]
    draw = random.Random(3)
    refused = 0
    for i in range(600 if DEEP else 60):
        bit = draw.randrange(8 * len(whole))
        if i % 2:  # in a record: most of a file is none
            bit = 8 * draw.choice(records) + draw.randrange(8 * 110)

        def flip(data, bit=bit):
            data[bit // 8] ^= 1 << bit % 8

        at = damaged_copy(tmp_path / 'whole', tmp_path / 'bad', 'g1-0/data.mdb', flip)
        signal, got = reader(at)
        assert not signal, f'bit {bit} ended the process by signal {signal}'
        refused += any(isinstance(value, str) for value in got.values())
        for name, value in judge(got, expected):
            lost = [row for row in np.atleast_2d(np.array(value, float)) if np.isnan(row).all()]
            assert lost and name not in ('position', 'clock'), f'bit {bit}: {name} is {value}'
    assert refused


def test_a_flipped_value_is_refused_with_its_key_and_shard(tmp_path):
    make(tmp_path / 's', shards=3)
    value = np.float64(29.6 + 7).tobytes()
    for file in (tmp_path / 's').glob('*/data.mdb'):
        data = file.read_bytes()
        file.write_bytes(data.replace(value, bytes([value[0] ^ 4]) + value[1:]))
    store = LmdbStore(tmp_path / 's', readonly=True)
    for keys in (['key007'], KEYS):
        with pytest.raises(DamagedRecord, match=r'record last/k/key007 in .*/s/g1-\d as it was'):
            read_last(store, keys)
    assert read_last(store, ['key008']) == [[np.float32(37.6), 8]]
    store.close()
    store = LmdbStore(tmp_path / 's')
    with pytest.raises(DamagedRecord, match='key007'):
        push(store, LAST.name, KEYS, np.full(len(KEYS), 9), np.ones((len(KEYS), 2)))


@pytest.mark.parametrize('write', [False, True])
def test_a_page_of_zeros_ends_no_process(write, reader, tmp_path):
    make(tmp_path / 'whole')
    _, expected = reader(tmp_path / 'whole')
    pages = (tmp_path / 'whole' / 'g1-0' / 'data.mdb').stat().st_size // 4096
    said = set()
    for page in range(pages):

        def blank(data, page=page):
            data[4096 * page : 4096 * (page + 1)] = bytes(4096)

        at = damaged_copy(tmp_path / 'whole', tmp_path / 'bad', 'g1-0/data.mdb', blank)
        signal, got = reader(at, write)
        assert not signal, f'page {page} of {pages} ended the process by signal {signal}'
        assert not judge(got, expected), f'page {page}'
        said |= {value for value in got.values() if isinstance(value, str)}
    assert any('rebuild the store from the log' in each for each in said)


def test_a_changed_manifest_or_redo_log_is_refused(tmp_path):
    make(tmp_path / 's', shards=2)
    file = tmp_path / 's' / 'store.json'
    text = file.read_bytes()
    draw = random.Random(1)
    for _ in range(60):
        bit = draw.randrange(8 * len(text))
        changed = bytearray(text)
        changed[bit // 8] ^= 1 << bit % 8
        file.write_bytes(changed)
        try:
            store = LmdbStore(tmp_path / 's', readonly=True)
        except MlrefError:
            continue
        assert (store.position(), store.layouts[LAST.name]) == (123456, LAST), changed
        store.close()
    for odd in (b'', text[:40], b'[]', b'{"format": 2}'):
        file.write_bytes(odd)
        with pytest.raises(MlrefError, match='rebuild'):
            LmdbStore(tmp_path / 's')
    file.write_bytes(text)
    (tmp_path / 's' / 'redo').write_bytes(seal(b'')[:-1] + b'\1')
    with pytest.raises(DamagedRecord, match='record redo as it was written'):
        LmdbStore(tmp_path / 's')


def test_an_old_store_is_refused_by_a_sentence(tmp_path):
    make(tmp_path / 's')
    about = json.loads((tmp_path / 's' / 'store.json').read_text())
    (tmp_path / 's' / 'store.json').write_text(json.dumps(about | {'format': 1}))
    with pytest.raises(MlrefError, match='of format 2 .* found one of format 1; rebuild it'):
        LmdbStore(tmp_path / 's')


def test_a_store_without_its_manifest_is_not_begun_anew_over_its_parts(tmp_path):
    make(tmp_path / 's')
    (tmp_path / 's' / 'store.json').rename(tmp_path / 'store.json')
    for readonly in (True, False):
        with pytest.raises(MlrefError, match='put it back, or delete the folder'):
            LmdbStore(tmp_path / 's', readonly=readonly)
    (tmp_path / 'store.json').rename(tmp_path / 's' / 'store.json')
    assert LmdbStore(tmp_path / 's', readonly=True).position() == 123456


def test_every_flipped_bit_of_a_short_record_is_found():
    sealed = seal(b'a record of a few words')
    draw = random.Random(2)
    for _ in range(3000):
        changed = bytearray(sealed)
        for _ in range(draw.choice((1, 2, 3))):
            changed[draw.randrange(len(sealed))] ^= 1 << draw.randrange(8)
        assert is_sealed(changed) == (bytes(changed) == sealed)


# files of other kinds: what a process writes for the next one


def flipped(data, count, seed=5):
    "Copies of some bytes with one bit changed, anywhere in them"
    draw = random.Random(seed)
    for _ in range(count):
        changed = bytearray(data)
        changed[draw.randrange(len(data))] ^= 1 << draw.randrange(8)
        yield bytes(changed)


def answers_of_damaged(file, read, count=150):
    "What a reader says of a file with one changed bit: values, or 'refused'"
    whole = file.read_bytes()
    answers = []
    for data in flipped(whole, count * (10 if DEEP else 1)):
        file.write_bytes(data)
        try:
            answers.append(read())
        except MlrefError as error:
            assert len(str(error).splitlines()) == 1, error
            answers.append('refused')
    file.write_bytes(whole)
    return answers


def test_a_cached_table_with_a_changed_bit_is_made_again_and_ends_no_process(tmp_path, monkeypatch):
    "Mapped as it is, it gives other numbers, or ends the process by a signal"
    monkeypatch.setenv('MLREF_CACHE', str(tmp_path))
    frame = pl.DataFrame({'t': range(500), 'name': [f'flight {i}' for i in range(500)]})
    made = []

    def read():
        return cached_frame('year', [2013], lambda: made.append(1) or frame)

    assert read().equals(frame)
    file = next(tmp_path.rglob('year.arrow'))
    for data in flipped(file.read_bytes(), 100):
        file.unlink()  # the old one may still be mapped
        file.write_bytes(data)
        with pytest.warns(UserWarning, match='year.arrow is not as it was written'):
            assert read().equals(frame)
    assert len(made) == 101
    next(tmp_path.rglob('.year.arrow.crc32')).unlink()  # its writer was killed before
    assert read().equals(frame) and len(made) == 102


def test_reference_scores_with_a_changed_bit_are_refused(tmp_path):
    registry = SimpleNamespace(folder=tmp_path)
    scores = pl.DataFrame({'cutoff': range(300), 'p': np.linspace(0, 1, 300)})
    file = write_reference(registry, 'v', scores)
    answers = answers_of_damaged(file, lambda: read_reference(registry, 'v'))
    assert set(answers) == {'refused'}
    assert read_reference(registry, 'v').equals(scores)


def write_state(folder):
    publish_state(folder, lambda state: replace(state, champion='a1b2', plan={'salt': 'x1'}))
    return folder / 'state.json'


def write_waiting(folder):
    note = {'tags': {'model': 'm', 'fits': '12'}, 'metrics': {'auc': 0.77}, 'failed': ['full']}
    return write_checked_json(folder / 'set_aside' / 'm.json', note)


def write_saved_checkpoint(folder):
    return save_checkpoint(folder, 7, {'w': torch.ones(3)}, {'seed': 3, 'best': 0.44})


def write_model(folder):
    model = TorchPredictor(linear_net(('a', 'b'), {}), trained_until=9)
    save_model(model, folder)
    return folder / 'model.json'


def write_run(folder):
    record = {'id': 'one', 'profile': 'quick', 'given': {'train': {'epochs': 12}}, 'done': {}}
    return write_checked_json(folder / 'runs' / 'one' / 'run.json', record)


NOTES = {
    'record of a run': (write_run, lambda file: read_checked_json(file, 'a run', 'start anew')),
    'state of a server': (write_state, lambda file: read_state(file.parent)),
    'model set aside': (
        write_waiting,
        lambda file: list_set_aside(SimpleNamespace(folder=file.parent.parent)),
    ),
    'checkpoint': (write_saved_checkpoint, lambda file: load_about(file.parent)),
    'description of a model': (write_model, lambda file: read_description(file.parent)),
}


def load_about(folder):
    found = load_checkpoint(folder)
    return 'refused' if found is None else found.about


def says_the_same(answer, whole):
    "A bit of the word `digest` leaves a field of another name"
    if isinstance(answer, dict):
        return {name: answer.get(name) for name in whole} == whole
    return answer == whole


@pytest.mark.parametrize('kind', NOTES)
def test_a_note_with_a_changed_bit_says_the_same_or_is_refused(kind, tmp_path):
    write, read = NOTES[kind]
    file = write(tmp_path)
    whole = read(file)
    answers = answers_of_damaged(file, lambda: read(file))
    refused = [answer for answer in answers if isinstance(answer, str) and answer == 'refused']
    others = [answer for answer in answers if not says_the_same(answer, whole)]
    assert len(others) == len(refused) > len(answers) / 2
    assert read(file) == whole


@pytest.mark.filterwarnings('ignore:expected a number of workers')
def test_a_number_of_workers_with_a_changed_bit_is_not_another_number(tmp_path):
    assert wanted_workers(tmp_path, 2) == 2  # nobody has said
    set_workers(tmp_path, 5)
    file = tmp_path / 'workers' / 'wanted'
    answers = answers_of_damaged(file, lambda: wanted_workers(tmp_path, 2), 400)
    assert {2} <= {*answers} <= {2, 5}
    file.write_text(file.read_text().replace('5', '7', 1))
    with pytest.warns(UserWarning, match='got: .* its digest says otherwise.* goes on with 2'):
        assert wanted_workers(tmp_path, 2) == 2


def test_a_cache_without_room_says_so(tmp_path, monkeypatch):
    monkeypatch.setenv('MLREF_CACHE', str(tmp_path))

    def make():
        raise OSError(28, 'No space left on device')

    with pytest.raises(MlrefError, match='No space left .* name another folder with MLREF_CACHE'):
        cached_frame('year', [2013], make)


def test_a_sketch_with_a_changed_bit_says_the_same_or_is_refused():
    rows = pl.DataFrame({'p': np.linspace(0, 1, 200), 'a': np.arange(200.0)})
    whole = encode_sketch(count_rows(rows, freeze_bins(rows, ('a',))))
    refused = 0
    for data in flipped(whole, 400):
        try:
            assert encode_sketch(decode_sketch(data)) == whole
        except MlrefError:
            refused += 1
    assert refused > 200
