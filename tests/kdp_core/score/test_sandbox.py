"""Programs under limits: what passes, what is cut, and what leaks neither in nor out."""
import os
import select

import pytest

from kdp_core.score import sandbox
from kdp_core.score.sandbox import Limits, passes


@pytest.mark.parametrize("program", [
    "assert sum(range(10)) == 45", "import json\nassert json.loads('[1]') == [1]", "def f():\n    return 1\nassert f()",
    "if __name__ == '__main__':\n    x = 1", "print('é' * 10 ** 6)"])
def test_programs_that_run_to_their_end_pass(program):
    assert passes(program)


@pytest.mark.parametrize("program", [
    "assert False", "1 / 0", "def f(:", "import sys\nsys.exit(0)", "import os\nos._exit(0)", "raise SystemExit",
    "raise KeyboardInterrupt", "import os, signal\nos.kill(os.getpid(), signal.SIGKILL)", "input()"])
def test_errors_and_early_exits_fail(program):
    assert not passes(program)


@pytest.mark.parametrize(("program", "limits"), [
    ("while True:\n    pass", Limits(cpu_seconds=1)),
    ("import time\ntime.sleep(60)", Limits(wall_seconds=0.5)),
    ("x = bytearray(2 ** 30)", Limits(memory_mib=512)),
    ("open('big', 'wb').write(bytes(3 * 2 ** 20))", Limits(file_mib=1)),
    ("kept = [open('f%d' % i, 'w') for i in range(100)]", Limits(files=32))])
def test_limits_end_a_program(program, limits):
    assert not passes(program, limits)


def test_the_same_programs_pass_under_wider_limits():
    assert passes("x = bytearray(2 ** 28)\nopen('big', 'wb').write(bytes(3 * 2 ** 20))", Limits(file_mib=8))


def test_nothing_of_the_caller_is_seen(monkeypatch, tmp_path):
    monkeypatch.setenv("SECRET_OF_THE_CALLER", "1")
    monkeypatch.chdir(tmp_path)
    assert passes("import os\nassert 'SECRET_OF_THE_CALLER' not in os.environ\nassert os.listdir('.') == []\n"
                  f"assert os.getcwd() != {str(tmp_path)!r}")


def test_files_are_gone_afterwards(tmp_path, monkeypatch):
    monkeypatch.setattr(sandbox.tempfile, "tempdir", str(tmp_path))
    assert passes("open('left', 'w').write('x')")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(not hasattr(os, "pidfd_open"), reason="needs Linux to watch a process that is no child")
def test_children_do_not_outlive_the_program(tmp_path):
    path = tmp_path / "pid"
    program = ("import subprocess, sys\n"
               "child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)'])\n"
               f"open({str(path)!r}, 'w').write(str(child.pid))")
    assert passes(program)
    try:
        child = os.pidfd_open(int(path.read_text()))
    except ProcessLookupError:
        return  # gone and collected already
    ended = select.poll()
    ended.register(child, select.POLLIN)
    # a process that was killed becomes readable as it ends, which the kernel may do a moment later
    assert ended.poll(10_000)
    os.close(child)
