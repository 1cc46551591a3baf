"""Python programs in a process of their own, with limits on time, memory and files: what pass@1 of code tasks rests on.

The program runs under `python -I` in an empty temporary folder, without the caller's environment, standard input or
output, and its whole process group is killed in the end. This keeps accidents small (endless loops, full disks, stray
children). It is no jail: the program has the user's rights and the network. Run models that you do not trust in a
container. Needs a POSIX system.
"""
import contextlib
import os
import signal
import subprocess
import sys
import tempfile
from typing import NamedTuple

PASSED = 87
"""Exit status of a program that ran to its end: none that leaves by itself, as with sys.exit(0), gets it by chance."""
RUNNER = """
import os, resource, sys
for name, value in {limits}:
    limit = getattr(resource, "RLIMIT_" + name, None)
    if limit is not None:
        resource.setrlimit(limit, (value, value))
program = sys.stdin.read()
try:
    exec(compile(program, "program.py", "exec"), {{"__name__": "__main__"}})
except BaseException:
    os._exit(1)
os._exit({passed})
"""
QUIET_THREADS = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
"""Numerical libraries otherwise reserve memory for each core, which the limit would refuse."""


class Limits(NamedTuple):
    """What a program may use. Time is meant to be cut by the processor's clock, which other jobs do not move."""
    cpu_seconds: int = 5
    wall_seconds: float = 20.0
    """Ends programs that wait instead of compute."""
    memory_mib: int = 2048
    """Address space, libraries included."""
    file_mib: int = 16
    """Size of a written file."""
    files: int = 64
    """Open files."""


def passes(program: str, limits: Limits = Limits()) -> bool:  # noqa: B008  an immutable default
    """Whether the program runs to its end, without an error and within the limits."""
    # output is dropped: nothing the program says decides, and a flood of it costs no memory
    with tempfile.TemporaryDirectory(prefix="kdp-program-") as folder:
        process = subprocess.Popen(
            [sys.executable, "-I", "-c", _runner(limits)], cwd=folder, env=dict(QUIET_THREADS), stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True)
        try:
            process.communicate(program.encode("utf-8", "replace"), timeout=limits.wall_seconds)
        except subprocess.TimeoutExpired:
            return False
        finally:
            _end(process)
    return process.returncode == PASSED


def _runner(limits: Limits) -> str:
    mib = 2 ** 20
    values = [("CPU", limits.cpu_seconds), ("AS", limits.memory_mib * mib), ("FSIZE", limits.file_mib * mib),
              ("NOFILE", limits.files), ("CORE", 0)]
    return RUNNER.format(limits=values, passed=PASSED)


def _end(process: subprocess.Popen) -> None:
    """Kill what is left of the process and of its children."""
    # an empty group is no process, or on some systems not ours
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    with contextlib.suppress(BrokenPipeError):
        process.stdin.close()
