"What Feast is told in a benchmark: views of last values over files; runs in Feast's environment"

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path

os.environ['FEAST_USAGE'] = 'False'
import numpy as np
from feast import (
    Entity,
    FeatureService,
    FeatureStore,
    FeatureView,
    Field,
    FileSource,
    PushSource,
    ValueType,
)
from feast.types import Float64


class FeastRepo:
    "A repository of Feast in a folder, with the views that its spec names"

    def __init__(
        self,
        home: Path,  # With spec.json, and a file a view
        name: str,  # Of the folder of the repository in it
        project: str,
        online: str,  # Lines of the online store in feature_store.yaml
    ):
        self.home = home
        self.spec = json.loads((home / 'spec.json').read_text())
        self.key = self.spec['key']
        self.path = home / name
        self.path.mkdir(exist_ok=True)
        (self.path / 'feature_store.yaml').write_text(
            f'project: {project}\nprovider: local\n'
            'registry:\n  path: registry.db\n  cache_ttl_seconds: 3600\n'
            f'online_store:\n{online}entity_key_serialization_version: 3\n'
        )
        self.store = FeatureStore(repo_path=str(self.path))
        self.entity = Entity(name=self.key, join_keys=[self.key], value_type=ValueType.STRING)
        self.views = [self.make_view(*view) for view in self.spec['views'].items()]
        self.whole = FeatureService(name='whole', features=self.views)
        self.refs = [f'{view}:{x}' for view, xs in self.spec['views'].items() for x in xs]

    def make_view(self, name: str, values: list[str]) -> FeatureView:
        "Last values of the entity, which are pushed"
        rows = FileSource(
            name=f'{name}_rows', path=str(self.home / f'{name}.parquet'), timestamp_field='known'
        )
        return FeatureView(
            name=name,
            entities=[self.entity],
            schema=[Field(name=value, dtype=Float64) for value in values],
            online=True,
            source=PushSource(name=f'{name}_push', batch_source=rows),
        )

    def matrix(self, response) -> np.ndarray:
        "A response as a matrix, the quickest way"
        names = [name.split('__')[-1] for name in response.proto.metadata.feature_names.val]
        at = [names.index(ref.split(':')[1]) for ref in self.refs]
        columns = response.proto.results
        return np.array([[value.double_val for value in columns[i].values] for i in at]).T

    def read(self, wanted, keys: list[str]) -> np.ndarray:
        "Numbers of some entities, by references or a service"
        rows = [{self.key: each} for each in keys]
        return self.matrix(self.store.get_online_features(wanted, rows))


def answer_lines(answer: Callable[[dict], dict]) -> None:
    "One JSON line answers one, until standard input ends"
    print(json.dumps({'ready': True}), flush=True)
    for line in sys.stdin:
        try:
            found = answer(json.loads(line))
        except Exception as error:
            found = {'error': f'{type(error).__name__}: {error}'[:300]}
        print(json.dumps(found), flush=True)
