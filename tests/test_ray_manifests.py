"""What a guide tells Kubernetes and `ray up`, checked as these check it; neither is run here"""

import copy
import json
from pathlib import Path

import jsonschema
import pytest
import yaml
from click import ClickException

from programs import need_package

ROOT = Path(__file__).resolve().parent.parent
GUIDE = ROOT / 'nbs' / 'guides' / 'move_to_ray.ipynb'
SCHEMA = json.loads((Path(__file__).parent / 'kuberay_raycluster.json').read_text())


def check_cluster(manifest):
    "As Kubernetes does it for the operator, which refuses unknown fields, and as `ray start` does"
    jsonschema.validate(manifest, SCHEMA)
    need_package('ray')
    from ray.scripts.scripts import start

    options = {word for option in start.params for word in option.opts}
    spec = manifest['spec']
    for group in (spec['headGroupSpec'], *spec['workerGroupSpecs']):
        for name in group['rayStartParams']:  # the schema does not know them
            if f'--{name}' not in options:
                raise ValueError(f'expected an option of ray start, got {name}')


def check_launcher(config):
    "As `ray up` does it before it touches a machine"
    need_package('ray')
    from ray.autoscaler._private.util import prepare_config, validate_config

    jsonschema.validate(config, launcher_schema())
    validate_config(prepare_config(copy.deepcopy(config)))


def launcher_schema():
    import ray

    return json.loads((Path(ray.__file__).parent / 'autoscaler' / 'ray-schema.json').read_text())


REFUSED = (jsonschema.ValidationError, ClickException, ValueError, KeyError)
CHECKS = {'KUBERAY': check_cluster, 'CLUSTER': check_launcher}


def read_guide(name):
    "A text that the guide shows, as the guide has it"
    for cell in json.loads(GUIDE.read_text())['cells']:
        source = ''.join(cell['source'])
        if source.startswith(f'{name} = """'):
            return yaml.safe_load(source.split('"""')[1])
    raise AssertionError(f'the guide has no {name}')


def list_fields(node, path=()):
    "The way to every field"
    pairs = node.items() if isinstance(node, dict) else enumerate(node)
    for key, value in pairs:
        if isinstance(node, dict):
            yield (*path, key)
        if isinstance(value, dict | list):
            yield from list_fields(value, (*path, key))


def change_field(document, path, change):
    "A copy in which one field is another"
    found = json.loads(json.dumps(document))  # what an anchor shares is then there twice
    node = found
    for key in path[:-1]:
        node = node[key]
    change(node, path[-1])
    return found


def misspell(node, key):
    node[f'{key}x'] = node.pop(key)


@pytest.mark.parametrize('name', CHECKS)
def test_what_the_guide_shows_is_accepted(name):
    CHECKS[name](read_guide(name))


@pytest.mark.parametrize('name', CHECKS)
def test_every_field_that_is_misspelled_is_refused(name):
    document = read_guide(name)
    fields = list(list_fields(document))
    assert len(fields) > 10
    taken = []
    for path in fields:
        try:
            CHECKS[name](change_field(document, path, misspell))
            taken.append(path)
        except REFUSED:
            pass
    assert taken == []


WRONG = {
    ('spec', 'workerGroupSpecs', 0, 'replicas'): '2',
    ('spec', 'headGroupSpec', 'rayStartParams', 'dashboard-host'): 1,
    ('spec', 'headGroupSpec', 'template', 'spec', 'containers'): [],
    ('spec', 'headGroupSpec', 'template', 'spec', 'containers', 0, 'resources', 'limits'): {
        'memory': '8 GB'
    },
    ('apiVersion',): 'ray.io/v1alpha1',
}


@pytest.mark.parametrize('path', WRONG, ids=lambda path: str(path[-1]))
def test_a_value_of_another_type_is_refused(path):
    def change(node, key):
        node[key] = WRONG[path]

    with pytest.raises(jsonschema.ValidationError):
        check_cluster(change_field(read_guide('KUBERAY'), path, change))


def test_the_versions_of_the_manifest_are_those_installed():
    need_package('ray')
    import ray

    assert read_guide('KUBERAY')['spec']['rayVersion'] == ray.__version__
