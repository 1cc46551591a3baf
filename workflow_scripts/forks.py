"""Forks the jobs of a run on this machine from one process that has already imported the heavy packages.

Each job is a separate process. Without this module, each job would import torch and transformers, which takes 2 to 5
seconds of one core. With this module, a server imports the third-party packages once, at the first job, and then forks
a process for each job. The server does not import kdp_core, so each forked process reads the code on disk at that
moment. `python` is a small program that accepts the same arguments as the interpreter (a script, `-m`, `-c`). The small
program sends its arguments, environment, folder and streams to the server, and ends with the exit code of the forked
process. In the forked process, `sys.executable` is the path of the small program too. If the small program cannot reach
the server, it replaces itself by the interpreter.

The forked process is not a child of the small program. The small program therefore forwards SIGTERM to the forked
process. SIGINT from a terminal reaches both processes anyway. If the small program is killed, the server kills the
forked process. The server's standard input is a pipe. The server ends when all processes have closed the write end of
its input pipe and no forked process runs any more.
"""
import atexit
import contextlib
import gc
import json
import os
import runpy
import select
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

PRELOADED = ("numpy", "pandas", "scipy.stats", "sklearn.cluster", "matplotlib.figure",
             "matplotlib.backends.backend_pdf", "matplotlib.backends.backend_agg", "torch", "safetensors.torch", "zarr",
             "transformers", "transformers.models.auto.modeling_auto", "transformers.models.llama.modeling_llama",
             "transformers.generation.utils", "accelerate", "lm_eval", "lm_eval.models.huggingface", "lm_eval.tasks",
             "datasets", "pytest", "jsonschema", "jinja2", "snakemake.script")
# -P: files in this folder must not hide modules of Python
ENVIRONMENT = {"TOKENIZERS_PARALLELISM": "false", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
"""Variables that the packages read when they are imported; workflow_scripts/job.py sets them before an import."""
PROGRAM = """#!/bin/sh
exec '{python}' -IS '{client}' "$@"
"""
CLIENT = """import _socket, array, json, os, signal, sys
signal.signal(signal.SIGINT, signal.SIG_IGN)
try:
    server = _socket.socket(_socket.AF_UNIX, _socket.SOCK_STREAM)
    server.connect({address!r})
    asked = json.dumps([sys.argv[1:], os.getcwd(), dict(os.environ)]).encode()
    server.sendmsg([len(asked).to_bytes(8, "big")],
                   [(_socket.SOL_SOCKET, _socket.SCM_RIGHTS, array.array("i", [0, 1, 2]).tobytes())])
    while asked:
        asked = asked[server.send(asked):]
    pid = server.recv(4)
except OSError:
    pid = b""
if not pid:
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    os.execv({python!r}, [{python!r}, *sys.argv[1:]])
signal.signal(signal.SIGTERM, lambda number, frame: os.kill(int.from_bytes(pid, "big"), number))
code = server.recv(1)
os._exit(code[0] if code else 1)
"""


class Asked(NamedTuple):
    """The program that a forked process runs, with its folder and environment."""
    arguments: list[str]
    folder: str
    environment: dict[str, str]


@contextlib.contextmanager
def python(more: tuple[str, ...] = (), environment: Mapping[str, str] | None = None,
           shared: bool = False) -> Iterator[str]:
    """Yield the path of the small program `python`, or the interpreter's path if the system does not allow such forks.

    more: names of further packages that the server imports once.
    environment: further environment variables of the server.
    shared: with true, the server runs until the caller and all processes that the caller started have ended. The server
        then survives if only the caller is killed.
    """
    folder, (read, write) = Path(tempfile.mkdtemp(prefix="forks-")), os.pipe()
    with contextlib.ExitStack() as stack:
        stack.callback(shutil.rmtree, folder, ignore_errors=True)
        # the server ends when this end of the pipe is closed
        stack.callback(os.close, write)
        try:
            # on other systems, system libraries do not work in forked processes
            found = _start(folder, read, more, environment or {}) if sys.platform == "linux" else None
        finally:
            os.close(read)
        os.set_inheritable(write, shared)
        yield found or sys.executable


def _start(folder: Path, read: int, more: tuple[str, ...], environment: Mapping[str, str]) -> str | None:
    """Start the server and return the path of the small program; None if this system does not allow it.

    The server imports the third-party packages at the first request.
    """
    address = str(folder / "forks.sock")
    with socket.socket(socket.AF_UNIX) as listener:
        try:
            listener.bind(address)
        except OSError:  # the path of the folder for temporary files is too long
            return None
        listener.listen(64)
        (folder / "client.py").write_text(CLIENT.format(address=address, python=sys.executable), encoding="utf-8")
        program = folder / "python"
        program.write_text(PROGRAM.format(python=sys.executable, client=folder / "client.py"), encoding="utf-8")
        program.chmod(0o755)
        if not os.access(program, os.X_OK):  # nothing in the folder for temporary files may be executed
            return None
        subprocess.Popen([sys.executable, "-P", __file__, str(program), str(listener.fileno()), *more], stdin=read,
                         pass_fds=[listener.fileno()], env={**os.environ, **ENVIRONMENT, **environment})
    return str(program)


def serve(listener: socket.socket, names: list[str]) -> Asked:
    """Run the server: fork a process for each request.

    The function returns only in a forked process, with the request.
    """
    # Ctrl-C in a terminal is meant for the jobs
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    waiting: dict[int, socket.socket] = {}
    woken, wake = socket.socketpair()
    loaded, held = False, True
    signal.signal(signal.SIGCHLD, lambda *_: wake.send(b"x"))
    while held or waiting:
        ready = select.select([listener, woken, *waiting.values(), *([sys.stdin] if held else [])], [], [])[0]
        if woken in ready:
            woken.recv(64)
        _report(waiting)
        for pid, client in waiting.items():
            if client in ready and not _alive(client):
                os.kill(pid, signal.SIGKILL)
        held = held and not (sys.stdin in ready and not os.read(0, 1))
        if listener in ready:
            if not loaded:
                _load(names)
                loaded = True
            if asked := _fork(listener, waiting, [woken, wake]):
                return asked
    os._exit(0)


def _load(names: list[str]) -> None:
    for name in names:
        __import__(name)
    # loaded modules are never garbage, and a garbage collection would copy their memory into each process
    gc.collect()
    gc.freeze()


def _report(waiting: dict[int, socket.socket]) -> None:
    """Send the exit codes of processes that have ended to their clients."""
    with contextlib.suppress(ChildProcessError):
        while (ended := os.waitpid(-1, os.WNOHANG))[0]:
            code = os.waitstatus_to_exitcode(ended[1])
            with waiting.pop(ended[0]) as client, contextlib.suppress(OSError):
                # if a signal ended a process, its exit code is 128 + the signal's number, as in a shell
                client.sendall(bytes([code if code >= 0 else 128 - code]))


def _alive(client: socket.socket) -> bool:
    """Whether a client with a readable socket is still running.

    A running client writes nothing after its request, so a readable socket usually means that the client has ended.
    """
    try:
        return bool(client.recv(1))
    except OSError:
        return False


def _fork(listener: socket.socket, waiting: dict[int, socket.socket], own: list[socket.socket]) -> Asked | None:
    """Accept one request and fork. Returns the request in the forked process, and None in the server."""
    client = listener.accept()[0]
    try:
        head, streams, _, _ = socket.recv_fds(client, 8, 3)
        left, text = int.from_bytes(head, "big"), b""
        while len(text) < left:
            text += client.recv(left - len(text)) or b"!" * left
        asked = Asked(*json.loads(text))
    except (OSError, ValueError):  # the client was killed
        client.close()
        return None
    if pid := os.fork():
        waiting[pid] = client
        for stream in streams:
            os.close(stream)
        with contextlib.suppress(OSError):
            client.sendall(pid.to_bytes(4, "big"))
        return None
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    for one in (client, listener, *waiting.values(), *own):
        one.close()
    for number, stream in enumerate(streams):
        os.dup2(stream, number)
        os.close(stream)
    return asked


def become(asked: Asked, program: Path) -> None:
    """Run the script, module or command in `asked.arguments` as the interpreter would run it."""
    servers, given = _path(os.environ), _path(asked.environment)
    installed = [path for path in sys.path if path not in servers]
    os.chdir(asked.folder)
    os.environ.clear()
    os.environ.update(asked.environment)
    sys.executable = str(program)
    kind, *more = asked.arguments
    if kind == "-m":
        sys.argv, sys.path[:] = more, [asked.folder, *given, *installed]
        runpy.run_module(more[0], run_name="__main__", alter_sys=True)
    elif kind == "-c":
        sys.argv, sys.path[:] = ["-c", *more[1:]], ["", *given, *installed]
        exec(compile(more[0], "<string>", "exec"), {"__name__": "__main__", "__builtins__": __builtins__})
    else:
        sys.argv, sys.path[:] = asked.arguments, [str(Path(kind).resolve().parent), *given, *installed]
        runpy.run_path(kind, run_name="__main__")


def _path(environment: Mapping[str, str]) -> list[str]:
    return [path for path in environment.get("PYTHONPATH", "").split(os.pathsep) if path]


def ended(run: Callable[[], None]) -> int:
    """Run a program and return its exit code.

    Before this function returns, it waits for the program's threads and calls the program's exit functions.
    """
    try:
        run()
        code: Any = 0
    except SystemExit as stopped:
        code = stopped.code
        if isinstance(code, str):
            print(code, file=sys.stderr)
    except BaseException:
        sys.excepthook(*sys.exc_info())
        code = 1
    threading._shutdown()
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    return code if isinstance(code, int) else int(code is not None)


if __name__ == "__main__":
    place, number, *further = sys.argv[1:]
    wanted = serve(socket.socket(fileno=int(number)), [*PRELOADED, *further])
    # the interpreter does not clean up its modules, because this takes longer than many jobs
    os._exit(ended(lambda: become(wanted, Path(place))))
