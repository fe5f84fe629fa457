"Ray Serve: MODEL PORT FOLDER"

import os
import signal

os.environ['RAY_USAGE_STATS_ENABLED'] = '0'
import numpy as np
import ray
from ray import serve
from serve_model import arguments, open_scorer
from starlette.requests import Request

model, port, _ = arguments()


@serve.deployment(num_replicas=1, max_ongoing_requests=100, ray_actor_options={'num_cpus': 1})
class Scorer:
    def __init__(self, file: str):
        self.score = open_scorer(file)

    @serve.batch(max_batch_size=32, batch_wait_timeout_s=0.001)
    async def score_rows(self, rows: list[list[float]]) -> list[float]:
        return self.score(np.array(rows, np.float32)).tolist()

    async def __call__(self, request: Request) -> dict[str, float]:
        row = (await request.json())['features']
        return {'p': await self.score_rows(row)}


ray.init(
    num_cpus=2,
    include_dashboard=False,
    logging_level='error',
    log_to_driver=False,
    object_store_memory=200 * 2**20,
    runtime_env={'env_vars': {'PYTHONPATH': os.path.dirname(os.path.abspath(__file__))}},
)
serve.start(http_options={'host': '127.0.0.1', 'port': port})
serve.run(Scorer.bind(model), route_prefix='/predict', logging_config={'log_level': 'ERROR'})
signal.pause()
