"""The forked Python does what the interpreter does: arguments, streams, folder, environment, exit codes."""
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests import forks


def ran(python, folder, *arguments, given=""):
    done = subprocess.run([python, *arguments], cwd=folder, env={"NAME": "value", "PYTHONPATH": str(folder / "more")},
                          input=given, capture_output=True, text=True, check=False)
    return done.returncode, done.stdout, done.stderr.splitlines()[-1:]


@pytest.fixture
def folder(tmp_path):
    said = "import os, sys\nprint(sys.argv[1:], os.getcwd(), os.environ['NAME'], __name__, sys.stdin.read())\n"
    (tmp_path / "scripts").mkdir()
    (tmp_path / "more").mkdir()
    (tmp_path / "scripts/said.py").write_text("import beside\n" + said)
    (tmp_path / "scripts/beside.py").write_text("")
    (tmp_path / "more/module.py").write_text(said)
    return tmp_path


@pytest.mark.parametrize("arguments", [
    ("scripts/said.py", "a", "b"), ("-m", "module", "a"), ("-c", "import module", "a"),
    ("-c", "import sys; sys.exit(3)"), ("-c", "import sys; sys.exit('why')"), ("-c", "1 / 0"),
    ("-c", "import sys; sys.exit()"),
    ("-c", "import atexit; atexit.register(print, 'last'); print('first')"),
    ("-c", "import threading; threading.Timer(0.1, lambda: print('thread')).start()")])
def test_it_does_what_the_interpreter_does(folder, arguments):
    assert ran(forks.python(), folder, *arguments, given="typed") == ran(sys.executable, folder, *arguments,
                                                                        given="typed")


def test_it_reads_code_as_it_is_now(folder):
    before = ran(forks.python(), folder, "-c", "import module")
    (folder / "more/module.py").write_text("print('changed')\n")
    assert before != ran(forks.python(), folder, "-c", "import module") == (0, "changed\n", [])


def test_what_a_process_starts_is_forked_too(folder):
    inner = "import sys; print('torch' in sys.modules)"
    code = f"import sys, subprocess; subprocess.run([sys.executable, '-c', {inner!r}])"
    assert ran(forks.python(), folder, "-c", code) == (0, "True\n", [])


def test_no_code_of_this_checkout_is_imported_before():
    code = "import sys; sys.exit(bool({'kdp_core', 'kdp', 'job', 'planning', 'tests'} & set(sys.modules)))"
    assert ran(forks.python(), Path.cwd(), "-c", code) == (0, "", [])


def test_a_signal_that_ends_it_is_seen(folder):
    code, *_ = ran(forks.python(), folder, "-c", "import os; os.kill(os.getpid(), 9)")
    assert code == 128 + 9


WAITS = """
import os, signal, sys, time
def leave(number, frame):
    print("left", flush=True)
    sys.exit(3)
signal.signal(signal.SIGTERM, leave)
print(os.getpid(), flush=True)
time.sleep(60)
"""


@pytest.fixture
def waiting(folder):
    """A forked process that waits: the small program, and the number of the process."""
    program = subprocess.Popen([forks.python(), "-c", WAITS], cwd=folder, stdout=subprocess.PIPE, text=True)
    yield program, int(program.stdout.readline())
    program.kill()
    program.communicate()


def test_sigterm_is_handed_on(waiting):
    program, _ = waiting
    program.terminate()
    assert program.communicate(timeout=30)[0] == "left\n" and program.returncode == 3


def test_sigint_is_left_to_the_process_itself(waiting):
    program, pid = waiting
    program.send_signal(signal.SIGINT)
    time.sleep(0.2)
    assert program.poll() is None
    os.kill(pid, signal.SIGINT)
    program.communicate(timeout=30)
    assert program.returncode == 1


def test_a_process_dies_with_the_small_program(waiting):
    program, pid = waiting
    program.kill()
    deadline = time.monotonic() + 30
    while Path(f"/proc/{pid}").exists():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_without_its_server_it_is_the_interpreter(folder):
    with forks.forks.python() as python:
        program = Path(python).read_text(encoding="utf-8")
    # the server has ended, and what it wrote is deleted
    assert not Path(python).exists()
    again = folder / "python"
    again.write_text(program.replace(str(Path(python).parent), str(folder)), encoding="utf-8")
    again.chmod(0o755)
    address = str(folder / "nobody.sock")
    (folder / "client.py").write_text(forks.forks.CLIENT.format(address=address, python=sys.executable))
    assert ran(str(again), folder, "scripts/said.py", "a") == ran(sys.executable, folder, "scripts/said.py", "a")


def test_a_folder_that_allows_no_programs_is_not_used(monkeypatch):
    monkeypatch.setattr(forks.forks.os, "access", lambda path, mode: False)
    with forks.forks.python() as python:
        assert python == sys.executable
