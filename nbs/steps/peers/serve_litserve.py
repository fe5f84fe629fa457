"LitServe: MODEL PORT FOLDER"

import litserve
import numpy as np
from serve_model import arguments, open_scorer


class Scorer(litserve.LitAPI):
    def setup(self, device):
        self.score = open_scorer(arguments()[0])

    def decode_request(self, request):
        return np.array(request['features'], np.float32)

    def batch(self, rows):
        return np.stack(rows)

    def predict(self, X):
        return self.score(X)

    def unbatch(self, scores):
        return scores.tolist()

    def encode_response(self, p):
        return {'p': p}


if __name__ == '__main__':
    api = Scorer(max_batch_size=32, batch_timeout=0.001)
    server = litserve.LitServer(api, accelerator='cpu', workers_per_device=1)
    server.run(
        host='127.0.0.1',
        port=arguments()[1],
        num_api_servers=1,
        log_level='warning',
        generate_client_file=False,
    )
