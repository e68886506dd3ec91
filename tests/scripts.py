"""Start train.py and eval.py, and say how they ended: status, standard output, standard error.

There are three ways, from the fastest to the most real:

- the fixtures `run_train` and `run_eval` (conftest.py) call `main` in the tests' own process: for
  all that needs no process of its own;
- the fixtures `fork` and, for several processes, `ranks` run a script as `__main__` in a copy of a
  process that has imported the libraries: for kills, signals, workers that die and torchrun's
  variables. What they watch or disturb stands in the test, as a context manager;
- `run` starts `python SCRIPT` as a user does: for imports, warnings and torchrun itself.

The first two use the small network, the third one uses ResNet-50 itself.
"""

import contextlib
import multiprocessing
import os
import runpy
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).parent.parent
# Flags of train.py with which an epoch takes less than a second.
SMALL = "--weights none --resolution 33 --batch-size 8 --lr 0.01 --workers 0".split()
SMALL += ["--no-compile", "--no-amp"]
# Seconds. Only a process that hangs takes as long, however slow and busy the machine is.
HANGS = 120


def run(*arguments, environment: dict | None = None, **options) -> tuple[int, str, str]:
    """Run `python ARGUMENTS` to its end."""
    process = subprocess.run(
        [sys.executable, *map(str, arguments)],
        cwd=ROOT,
        env={**os.environ, **(environment or {})},
        capture_output=True,
        text=True,
        timeout=HANGS,
        **options,
    )
    return process.returncode, process.stdout, process.stderr


FORKSERVER = multiprocessing.get_context("forkserver")
FORKSERVER.set_forkserver_preload(["small", "train", "eval", "pytest"])


class Fork(FORKSERVER.Process):
    """A script with the small network, and its workers, in a process group of their own.

    Args:
        inside: returns a context manager within which the script runs. It is a function at the top
            level of a test file, or a functools.partial of one.
    """

    def __init__(
        self,
        script: str,
        *flags,
        folder: Path,
        inside: Callable = contextlib.nullcontext,
        **environment,
    ):
        super().__init__()
        self.argv = [str(ROOT / script), *map(str, flags)]
        self.out = folder / "out"
        self.err = folder / "err"
        self.inside = inside
        self.environment = {name: str(value) for name, value in environment.items()}
        self.out.touch()
        self.err.touch()
        self.start()

    def run(self):
        """What the new process does."""
        os.setsid()
        for path, descriptor in ((self.out, 1), (self.err, 2)):
            os.dup2(os.open(path, os.O_WRONLY | os.O_APPEND), descriptor)
        os.environ.update(self.environment)
        # They have read the environment of the fork server.
        for name in ("train", "eval"):
            sys.modules.pop(name, None)
        # The script's own workers start as they do elsewhere.
        multiprocessing.set_start_method(None, force=True)
        sys.argv = self.argv
        with self.inside():
            runpy.run_path(sys.argv[0], run_name="__main__")

    def wait_for(self, beginning: str):
        """Wait for a line on standard output."""
        while f"\n{beginning}" not in f"\n{self.out.read_text()}":
            assert self.is_alive(), self.err.read_text()
            time.sleep(0.02)

    def end(self) -> tuple[int, str, str]:
        """Wait for the end."""
        self.join(HANGS)
        return self.exitcode, self.out.read_text(), self.err.read_text()


def children(pid: int) -> list[int]:
    """Return the process numbers of a process's children, as Linux tells them."""
    lists = [path.read_text() for path in Path(f"/proc/{pid}/task").glob("*/children")]
    return [int(child) for child in " ".join(lists).split()]


def is_running(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2]
    except FileNotFoundError:
        return False
    return not state.startswith("Z")


def success(outcome: tuple[int, str, str]) -> str:
    """Return the standard output of a script that has done its work."""
    status, out, err = outcome
    assert status == 0, err
    return out


def refusal(outcome: tuple[int, str, str]) -> str:
    """Return the one line that a script prints about a mistake the user can fix."""
    status, _, err = outcome
    assert status == 1, err
    assert err.count("\n") == 1, err
    return err
