"Ray Serve with the adapter of mlref: HOME PORT FOLDER ray|haproxy"

import signal
import sys
import tempfile
from pathlib import Path

from mlref.edges import find_program
from mlref.ext.ray_cluster import RayProcess, free_ports
from mlref.ext.ray_serve import RayServing, haproxy_settings, serve_on_ray
from mlref.flights.task import flights_task
from mlref.publisher import ServeOptions

home, port, folder, proxy = sys.argv[1:]
settings = {}
if proxy == 'haproxy':
    place = Path(tempfile.mkdtemp(prefix='p', dir=Path(folder).parent))
    metrics, statistics = free_ports(2)
    settings = haproxy_settings(find_program('haproxy'), place, (metrics, statistics))
options = ServeOptions(flights_task().address, home, folder, port=int(port), cache=0)
cluster = RayProcess(cpus=2, store_mb=200, settings=settings)
cluster.connect()
print('serving at', serve_on_ray(RayServing(options)), flush=True)
signal.pause()
