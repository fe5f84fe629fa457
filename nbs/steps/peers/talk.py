"A peer in an environment of its own, and a process that answers one JSON line with one"

import json
import os
import queue
import subprocess
import sys
import threading
import venv
from pathlib import Path


def install(folder: Path, *packages: str) -> tuple[Path | None, str]:
    "Its Python, made on first use; or None and why there is none"
    python = Path(folder).resolve() / 'bin' / 'python'
    done = Path(folder) / 'done'  # what is installed: another pin is installed over it
    wanted = ' '.join(packages)
    if done.exists() and done.read_text() == wanted:
        return python, ''
    print(f'installing {wanted} into {folder}; this takes a minute or two', flush=True)
    try:
        venv.create(folder, with_pip=True)
        r = subprocess.run(
            [str(python), '-m', 'pip', 'install', '-q', *packages],
            capture_output=True,
            text=True,
            timeout=600,
        )
    except (OSError, subprocess.SubprocessError) as e:
        return None, f'installing {wanted}: {type(e).__name__}'
    if r.returncode:
        return (
            None,
            (f'pip install {wanted}: {(r.stderr.strip().splitlines() or ["failed"])[-1][:200]}'),
        )
    done.write_text(wanted)
    return python, ''


class Peer:
    "A script that waits for questions, so that rounds of several may alternate"

    def __init__(self, python: Path, script: str, *args: str):
        mine = str(python) == sys.executable
        env = {
            k: v
            for k, v in os.environ.items()
            if mine or k not in ('PYTHONPATH', 'OMP_NUM_THREADS')
        }
        self.p = subprocess.Popen(
            [str(python), f'peers/{script}', *map(str, args)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            env=env,
        )
        self.lines = queue.Queue()
        threading.Thread(target=self._listen, daemon=True).start()
        self.answer(300)

    def _listen(self):
        for line in self.p.stdout:
            self.lines.put(line)
        self.lines.put('')

    def answer(self, seconds: float) -> dict:
        "The next line that is JSON; what went wrong under 'error'"
        while True:
            try:
                line = self.lines.get(timeout=seconds)
            except queue.Empty:
                self.p.kill()
                return {'error': f'no answer in {seconds:.0f} s'}
            if not line:
                return {'error': f'it ended with status {self.p.wait()}'}
            if line.startswith('{'):
                return json.loads(line)

    def ask(self, seconds: float = 300, **question) -> dict:
        try:
            self.p.stdin.write(json.dumps(question) + '\n')
            self.p.stdin.flush()
        except OSError:
            return {'error': f'it ended with status {self.p.wait()}'}
        return self.answer(seconds)

    def close(self):
        try:
            self.p.stdin.close()
            self.p.wait(20)
        except (OSError, subprocess.TimeoutExpired):
            self.p.kill()
