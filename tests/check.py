"""Everything that must hold before a change lands: ./run test [--deep]"""

import os, shutil, subprocess, sys, tempfile, time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
BIN = Path(sys.executable).parent


def exported():
    "What the notebooks generate is what is committed"
    with tempfile.TemporaryDirectory() as d:
        for n in ('settings.ini', 'nbs', 'mlref'):
            (shutil.copytree if (ROOT / n).is_dir() else shutil.copy)(ROOT / n, Path(d) / n)
        subprocess.run([BIN / 'nbdev_export'], cwd=d, check=True)
        return (
            subprocess.run(
                [
                    'git',
                    'diff',
                    '--no-index',
                    '--exit-code',
                    '--stat',
                    '--',
                    str(ROOT / 'mlref'),
                    str(Path(d) / 'mlref'),
                ]
            ).returncode
            if not strip(d)
            else 1
        )


def strip(d):
    for p in [*Path(d).rglob('__pycache__'), *(ROOT / 'mlref').rglob('__pycache__')]:
        shutil.rmtree(p, ignore_errors=True)


def command(*a):
    return lambda: subprocess.run([str(x) for x in a], cwd=ROOT).returncode


if __name__ == '__main__':
    deep = '--deep' in sys.argv
    if bad := [a for a in sys.argv[1:] if a != '--deep']:
        sys.exit(f'expected nothing or --deep, got {" ".join(bad)}')
    # two pages, then two files of tests, run side by side on two cores
    os.environ.update(MLREF_DEEP=str(int(deep)), MPLBACKEND='agg', OMP_NUM_THREADS='1')
    steps = {
        'generated code': exported,
        'page shapes': command(sys.executable, 'tests/pages.py', 'nbs'),
        'README in step': command(sys.executable, 'tests/readme.py', '--check'),
        'every page': command(
            BIN / 'nbdev_test',
            '--n_workers',
            '2',
            '--do_print',
            '--timing',
            '--skip_folder_re',
            '^[_.]|steps',
        ),
        'pytest': command(
            sys.executable,
            '-m',
            'pytest',
            'tests/test_pipeline.py',
            'tests',
            '-q',
            '-n',
            '2',
            '--dist',
            'loadfile',
            '--no-loadscope-reorder',
            '--durations',
            '12',
        ),
    }
    failed, t0 = [], time.time()
    for name, do in steps.items():
        t = time.time()
        print(f'== {name}', flush=True)
        try:
            rc = do()
        except Exception as e:
            print(e)
            rc = 1
        if rc:
            failed.append(name)
        print(
            (
                f'== {name}: {"FAILED" if rc else "ok"}, {time.time() - t:.0f} s;'
                f' {time.time() - t0:.0f} s in all'
                if name != 'pytest'
                else ''
            ),
            flush=True,
        )
    if failed:
        sys.exit(f'FAILED: {", ".join(failed)}')
