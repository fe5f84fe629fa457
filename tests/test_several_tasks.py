"""Two tasks on one real server, each with its run, its champion, its log and its routes"""

import json
import os
import re
import time

import numpy as np
import pytest

from mlref.cli_serving import ServeSettings, read_also, serve_options
from mlref.core import MlrefError
from mlref.publisher import ServeOptions, publish_champion
from mlref.registry import Registry
from mlref.serving_state import read_state
from server_fixture import Served, make_home, start_process, wait_gone

ONE = np.array([[1, 2]], np.float32)


@pytest.fixture(scope='module')
def both(tmp_path_factory):
    "A server started as `mlref serve --also` starts it"
    from small import FEATURES

    homes = [tmp_path_factory.mktemp(name) for name in ('late', 'early')]
    versions = [make_home(homes[0], 'small:TASK'), make_home(homes[1], 'small:OTHER')]
    also = [f'small:OTHER={homes[1]}']
    settings = ServeSettings(home=homes[0], port=0, workers=2, task='small:TASK', also=also)
    process, url = start_process(serve_options(settings, homes[0]))
    served = [
        Served(url, home, process.pid, tuple(names), FEATURES.names)
        for home, names in zip(homes, versions, strict=True)
    ]
    yield served
    os.kill(process.pid, 15)
    wait_gone(process.pid)


def models(server):
    return {each['name']: each for each in server.post('/v2/repository/index', b'')[1]}


def test_the_index_lists_both_and_each_has_its_own_routes(both):
    late, early = both
    assert {*models(late)} == {'late-visits', 'early-visits'}
    assert {each['state'] for each in models(late).values()} == {'READY'}
    for server, name in ((late, 'late-visits'), (early, 'early-visits')):
        status, told, _ = server.call('GET', f'/v2/models/{name}')
        assert (status, told['name']) == (200, name)
        assert server.versions[0] in told['versions']
        before = len(server.rows())
        path = f'/v2/models/{name}/predict'
        status, said = server.post(path, {'entities': [server.visit()]})
        assert (status, said['model_version']) == (200, server.versions[0])
        assert len(server.rows()) == before + 1
        status, said = server.post(f'/v2/models/{name}/infer', server.tensor(ONE))
        assert (status, said['model_name']) == (200, name)
    counted = [late.counted(model=name, status='200') for name in ('late-visits', 'early-visits')]
    assert counted == [2, 2]


def test_the_document_has_the_paths_of_both_and_each_of_them_is_there(both):
    late, early = both
    document = late.call('GET', '/openapi.json')[1]
    named = {path for path in document['paths'] if '/early-visits' in path}
    assert {f'/v2/models/early-visits/{each}' for each in ('infer', 'predict', 'events')} <= named
    for path in named:
        (method,) = document['paths'][path]
        asked = path.replace('{version}', early.versions[0])
        assert late.call(method.upper(), asked, b'')[0] not in (404, 405), path
    schemas = document['components']['schemas']
    referred = set(re.findall(r'"#/components/schemas/([^"]*)"', json.dumps(document)))
    assert referred <= {*schemas}
    body = schemas['early-visits.InferRequest']
    assert '"#/components/schemas/early-visits.InputTensor"' in json.dumps(body)


def test_a_path_without_a_name_is_the_first_tasks(both):
    late, early = both
    before = [len(each.rows()) for each in both]
    assert late.post('/predict', {'entities': [late.visit()]})[0] == 200
    assert [len(each.rows()) for each in both] == [before[0] + 1, before[1]]


def test_a_promotion_of_one_is_none_of_the_other(both):
    from mlref.promotion import promote

    late, early = both
    epoch = read_state(late.folder).epoch
    promote(Registry(early.home / 'registry', name='early-visits'), '1', 9 * 1440, 'for the test')
    publish_champion(ServeOptions('small:OTHER', str(early.home), str(early.folder)))

    def answers():
        asked = early.post('/v2/models/early-visits/predict', {'entities': [early.visit()]})
        return asked[1]['model_version']

    until = time.monotonic() + 60
    while answers() != early.versions[1]:
        assert time.monotonic() < until
        time.sleep(0.1)
    asked = late.post('/v2/models/late-visits/predict', {'entities': [late.visit()]})
    assert asked[1]['model_version'] == late.versions[0]
    assert read_state(late.folder).epoch == epoch


@pytest.mark.parametrize('text', ['shop:SHOP', '=folder', 'shop:SHOP=', 'shop:SHOP=/nowhere'])
def test_a_further_task_needs_a_run(text):
    with pytest.raises(MlrefError, match='expected'):
        read_also(text)


def test_a_run_is_served_once(tmp_path):
    (tmp_path / 'registry').mkdir()
    settings = ServeSettings(task='small:TASK', also=[f'small:OTHER={tmp_path}'])
    with pytest.raises(MlrefError, match='expected each of the runs of a server once'):
        serve_options(settings, tmp_path)
