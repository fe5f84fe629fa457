"""The document of the running server is true: schemathesis sends what it allows and forbids

Against a server in processes of its own, with keys, so that requests without one are tried as well.
"""

import json
import os
from copy import deepcopy
from urllib.request import urlopen

import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings, strategies
from schemathesis import GenerationMode
from schemathesis.config import SchemathesisConfig

from mlref.access import make_key, write_keys
from mlref.openapi import OPERATIONS
from server_fixture import start_copy

DEEP = os.environ.get('MLREF_DEEP') == '1'
# what a schema allows and still cannot be done: values that do not agree, a model that must stay
CHECKS = {
    'positive_data_acceptance': {'expected-statuses': ['2xx', '409', '422']},
    'negative_data_rejection': {
        'expected-statuses': ['400', '401', '404', '405', '413', '415', '422']
    },
}
examples = settings(
    max_examples=500 if DEEP else 12,
    deadline=None,
    suppress_health_check=list(HealthCheck),
    database=None,
    derandomize=not DEEP,
)


@pytest.fixture(scope='module')
def server(served, tmp_path_factory):
    "A server that may be spoilt, and a key for all of it"
    folder = tmp_path_factory.mktemp('api')
    token, key = make_key('all', ('predict', 'write', 'admin'))
    write_keys(folder / 'keys.json', [key])
    with start_copy(served, folder) as (running, _):
        yield running, token


def json_only(document):
    "Bodies in CSV and in binary have no schema; tests of their decoders stand elsewhere"
    document = deepcopy(document)
    for path in document['paths'].values():
        content = path.get('post', {}).get('requestBody', {}).get('content', {})
        for kind in [*content]:
            if kind != 'application/json':
                del content[kind]
    return document


@pytest.fixture(scope='module')
def api(server):
    "The document as the server gives it"
    running, _ = server
    with urlopen(f'{running.url}/openapi.json') as answer:
        document = json_only(json.load(answer))
    config = SchemathesisConfig.from_dict({'checks': CHECKS, 'base-url': running.url})
    return schemathesis.openapi.from_dict(document, config=config)


@pytest.mark.parametrize('each', OPERATIONS, ids=lambda each: f'{each.method} {each.path}')
def test_the_running_server_is_what_its_document_says(each, api, server):
    operation = api[each.path][each.method.upper()]
    modes = (GenerationMode.POSITIVE, GenerationMode.NEGATIVE)
    cases = [operation.as_strategy(generation_mode=mode) for mode in modes]
    headers = {'Authorization': f'Bearer {server[1]}'}

    @examples
    @given(strategies.one_of(cases))
    def ask(case):
        case.call_and_validate(headers=headers)

    ask()
