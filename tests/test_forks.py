"""The forked Python does what the interpreter does: arguments, streams, folder, environment, exit codes."""
import subprocess
import sys
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
