"""Runs a Python program in its own process, with limits on time, memory and files. The module computes the metric
pass@1 of code tasks.

The program runs under `python -I` in an empty temporary folder, without the caller's environment, standard input or
output, and its whole process group is killed at the end. The limits prevent accidents such as endless loops, full disks
and processes that never end. The limits do not stop an attack, because the program has the user's rights and access to
the network. Run models that you do not trust in a container. A POSIX system is needed.
"""
import contextlib
import os
import signal
import subprocess
import sys
import tempfile
from typing import NamedTuple

PASSED = 87
"""Exit status of a program that ran to its end. If a program exits before its end, for example by sys.exit(0), its exit
status is another number."""
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
"""Without these variables, numerical libraries reserve memory for each core, and the memory limit refuses it."""


class Limits(NamedTuple):
    """The limits of a program.

    A slow program should be ended by the limit of CPU time, because CPU time does not depend on other jobs.
    """
    cpu_seconds: int = 5
    wall_seconds: float = 20.0
    """Limit of elapsed time. The limit ends programs that wait without computing."""
    memory_mib: int = 2048
    """Limit of the address space, which also contains the loaded libraries."""
    file_mib: int = 16
    """Largest size of a file that the program writes."""
    files: int = 64
    """Largest number of open files."""


def passes(program: str, limits: Limits = Limits()) -> bool:  # noqa: B008  an immutable default
    """Whether the program runs to its end, without an error and within the limits."""
    # the output does not matter, so it is discarded, and a very long output needs no memory
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
    """Kill the process and its child processes if they are still running."""
    # for an empty group the error says that there is no process, or on some systems that the group is not ours
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    with contextlib.suppress(BrokenPipeError):
        process.stdin.close()
