"The default of a fit, one process alone: FOLDER of a job; the report is that of a rank"

import json
import sys
import time
from functools import partial
from pathlib import Path

from mlref.distributed import read_job
from mlref.model import save_model
from mlref.networks import TabularNet
from mlref.train import Runtime, fit_torch

folder = Path(sys.argv[1])
job, fit, stop = read_job(folder)
curve = []
runtime = Runtime(folder=folder / 'checkpoints', every=job.every, on_epoch=curve.append)
begin = time.perf_counter()
make = partial(TabularNet, width=job.width, drop=job.drop)
model = fit_torch(fit, stop, job.config, make=make, runtime=runtime)
report = {'seconds': time.perf_counter() - begin, 'history': [each.stop for each in curve]}
save_model(model, folder / 'model')
_ = (folder / 'report.json').write_text(json.dumps(report))
