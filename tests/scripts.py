"""Start train.py, eval.py and spy.py in processes of their own, and say how they ended."""

import multiprocessing
import os
import runpy
import subprocess
import sys
import time
from pathlib import Path

from small import use_small_resnet

ROOT = Path(__file__).parent.parent
# Flags of train.py with which an epoch takes less than a second.
SMALL = "--weights none --resolution 33 --batch-size 8 --lr 0.01 --workers 0".split()
SMALL += ["--no-compile", "--no-amp"]
# Seconds. Only a process that hangs takes as long, however slow and busy the machine is.
HANGS = 120


def start(*arguments, small: bool = True, environment: dict | None = None, **options):
    """Start `python SCRIPT FLAG…` as a user does, with ResNet-50 itself where not `small`."""
    replace_network = ["tests/small.py"] if small else []
    command = [sys.executable, *replace_network, *map(str, arguments)]
    options = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, **options}
    environment = {**os.environ, **(environment or {})}
    return subprocess.Popen(command, cwd=ROOT, env=environment, text=True, **options)


def run(*arguments, **options) -> tuple[int, str, str]:
    """`start` and wait; returns exit status, standard output and standard error."""
    with start(*arguments, **options) as process:
        try:
            out, err = process.communicate(timeout=HANGS)
        finally:
            process.kill()
    return process.returncode, out, err


FORKSERVER = multiprocessing.get_context("forkserver")
FORKSERVER.set_forkserver_preload(["train", "eval"])


class Fork(FORKSERVER.Process):
    """A script with the small network, and its workers, in a process group of their own.

    It is a copy of a process that has imported the libraries, which takes most of a test's time.
    """

    def __init__(self, script: str, *flags, folder: Path, **environment):
        super().__init__()
        self.argv = [str(ROOT / script), *map(str, flags)]
        self.out = folder / "out"
        self.err = folder / "err"
        self.environment = {name: str(value) for name, value in environment.items()}
        self.out.touch()
        self.err.touch()
        self.start()

    def run(self):
        """What the new process does."""
        os.setsid()
        for path, descriptor in ((self.out, 1), (self.err, 2)):
            os.dup2(os.open(path, os.O_WRONLY), descriptor)
        os.environ.update(self.environment)
        for name in ("train", "eval"):
            sys.modules.pop(name, None)
        # The script's own workers start as they do elsewhere.
        multiprocessing.set_start_method(None, force=True)
        use_small_resnet()
        sys.argv = self.argv
        runpy.run_path(self.argv[0], run_name="__main__")

    def wait_for(self, beginning: str):
        """Wait for a line on standard output."""
        while f"\n{beginning}" not in f"\n{self.out.read_text()}":
            assert self.is_alive(), self.err.read_text()
            time.sleep(0.02)

    def end(self) -> tuple[int, str, str]:
        """Wait for the end; returns exit status, standard output and standard error."""
        self.join(HANGS)
        return self.exitcode, self.out.read_text(), self.err.read_text()


def success(outcome: tuple[int, str, str]) -> str:
    """The standard output of a script that has done its work."""
    status, out, err = outcome
    assert status == 0, err
    return out


def refusal(outcome: tuple[int, str, str]) -> str:
    """The one line that a script says where the user can put something right."""
    status, _, err = outcome
    assert status == 1, err
    assert err.count("\n") == 1, err
    return err
