"The pyfunc that serve_mlflow.py saves as code, and MLflow runs"

import mlflow
import numpy as np
from serve_model import open_scorer


class Scorer(mlflow.pyfunc.PythonModel):
    def load_context(self, context):
        self.score = open_scorer(context.artifacts['model'])

    def predict(self, context, model_input, params=None):
        return self.score(np.asarray(model_input, np.float32))


mlflow.models.set_model(Scorer())
