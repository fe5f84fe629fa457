"""What the kernels of two commits share; it imports nothing of either"""

import json
import sys
import time
from collections.abc import Callable, Mapping

Kernel = Callable[[], object]


def times(n: int, run: Kernel) -> Kernel:
    "Run something fast so often that it can be timed"
    return lambda: [run() for _ in range(n)]


def answer(kernels: Mapping[str, Kernel]) -> None:
    "Say the names, then run the kernel of each line that comes and say what it took"
    print(json.dumps(list(kernels)), flush=True)
    for line in sys.stdin:
        run = kernels[json.loads(line)]
        wall = time.perf_counter()
        cpu = time.process_time()
        run()
        taken = {'wall': time.perf_counter() - wall, 'cpu': time.process_time() - cpu}
        print(json.dumps(taken), flush=True)
