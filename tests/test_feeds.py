"""How far each kind of event has come: whatever the batches and their order, in every store"""

import numpy as np
import polars as pl
import pytest

from mlref.core import DAY
from mlref.feed_times import FEEDS_KEY, decode_feeds
from mlref.lmdb_store import LmdbStore, reshard
from mlref.materialize import apply_events
from small import FEATURES, make_events

EVENTS = make_events()
NEWEST = dict(EVENTS.group_by('kind').agg(pl.col('known_time').max()).iter_rows())


def read_feeds(store):
    return decode_feeds(store.note(FEEDS_KEY))


@pytest.mark.parametrize('seed', range(5))
@pytest.mark.parametrize('shards', [1, 3])
def test_the_newest_of_each_kind_is_that_of_the_frame(tmp_path, seed, shards):
    random = np.random.default_rng(seed)
    store = LmdbStore(tmp_path, FEATURES, shards=shards)
    order = random.permutation(EVENTS.height)
    edges = np.sort(random.choice(EVENTS.height, 5, replace=False))
    for places in np.split(order, edges):
        apply_events(store, EVENTS[np.sort(places)])
        feeds = read_feeds(store)
        assert max(feeds.newest.values()) == store.clock()
    assert feeds.newest == NEWEST
    apply_events(store, EVENTS.head(0))  # no event is no news
    assert read_feeds(store) == feeds


def test_they_are_the_same_after_a_reshard_and_in_a_reader(tmp_path):
    store = LmdbStore(tmp_path, FEATURES)
    apply_events(store, EVENTS)
    reshard(store, 3)
    assert read_feeds(store).newest == NEWEST
    store.close()
    assert read_feeds(LmdbStore(tmp_path, readonly=True)).newest == NEWEST


def test_a_kind_that_never_came_is_behind_since_the_store_began(tmp_path):
    store = LmdbStore(tmp_path, FEATURES)
    visits = EVENTS.filter(kind='visit')
    apply_events(store, visits.head(10))
    apply_events(store, visits)
    first, last = visits['known_time'][0], visits['known_time'][-1]
    lags = read_feeds(store).lags(('visit', 'end'), store.clock())
    assert lags == {'visit': 0, 'end': last - first}


def test_a_store_of_an_earlier_release_begins_at_its_clock(tmp_path):
    store = LmdbStore(tmp_path, FEATURES)
    apply_events(store, EVENTS)
    before = store.clock()
    store.write({FEEDS_KEY: None})
    assert read_feeds(store) is None
    visits = EVENTS.filter(kind='visit').with_columns(pl.col('event_time', 'known_time') + DAY)
    apply_events(store, visits)
    lags = read_feeds(store).lags(('visit', 'end'), store.clock())
    assert lags == {'visit': 0, 'end': store.clock() - before}
