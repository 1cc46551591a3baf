"""A Python whose heavy imports are done: processes of the workflow under test are forked from one that has them.

A job of the workflow is a process that imports torch and transformers, which takes longer than the work of a pico job.
Here a server imports the packages of others once and then forks a process for each start of `python`. kdp_core is not
imported, so each process reads the code as it is then. `python` is a small program that takes the same arguments as the
interpreter (a script, `-m`, `-c`), hands them to the server with its environment, folder and streams, and ends with the
exit code of the forked process. `sys.executable` of that process is the small program again, so snakemake starts its
jobs in the same way.

A forked process is not the child of the one that asked for it and gets no signal that is sent to the small program.
Tests that send signals therefore start the interpreter itself.

    python tests/forks.py FOLDER    # the server, until its standard input ends
"""
import atexit
import contextlib
import functools
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
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

PRELOADED = ("numpy", "pandas", "scipy.stats", "sklearn.cluster", "matplotlib.figure",
             "matplotlib.backends.backend_pdf", "matplotlib.backends.backend_agg", "torch", "safetensors.torch", "zarr",
             "transformers", "transformers.models.auto.modeling_auto", "transformers.models.llama.modeling_llama",
             "transformers.generation.utils", "accelerate", "lm_eval", "lm_eval.models.huggingface", "lm_eval.tasks",
             "datasets", "pytest", "jsonschema", "snakemake.cli")
CLIENT = """#!{python} -IS
import _socket, array, json, os, sys
server = _socket.socket(_socket.AF_UNIX, _socket.SOCK_STREAM)
server.connect({address!r})
asked = json.dumps([sys.argv[1:], os.getcwd(), dict(os.environ)]).encode()
server.sendmsg([len(asked).to_bytes(8, "big")],
               [(_socket.SOL_SOCKET, _socket.SCM_RIGHTS, array.array("i", [0, 1, 2]).tobytes())])
while asked:
    asked = asked[server.send(asked):]
code = server.recv(1)
os._exit(code[0] if code else 1)
"""


@functools.cache
def python() -> str:
    """The path of `python`. The first call of a process starts its server; it takes some seconds."""
    if sys.platform != "linux":
        # elsewhere system libraries do not work in forked processes
        return sys.executable
    folder = Path(tempfile.mkdtemp(prefix="forks-"))
    # -P: what lies beside this file must not hide modules of Python
    server = subprocess.Popen(
        [sys.executable, "-P", __file__, str(folder)], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        env={**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false",
             "HF_HUB_DISABLE_PROGRESS_BARS": "1"})
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    atexit.register(server.communicate)
    if server.stdout.readline() != b"ready\n":
        raise RuntimeError(f"the server of forked processes ended with {server.wait()}; its error is above")
    return str(folder / "python")


def serve(folder: Path) -> tuple[list[str], str, dict[str, str]]:
    """Fork a process for each request. Returns in the forked process: (arguments, folder, environment)."""
    for name in PRELOADED:
        __import__(name)
    # what is loaded is never garbage, and to look at it would copy its memory into each process
    gc.collect()
    gc.freeze()
    address = str(folder / "forks.sock")
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(address)
        listener.listen(64)
        (folder / "python").write_text(CLIENT.format(python=sys.executable, address=address), encoding="utf-8")
        (folder / "python").chmod(0o755)
        print("ready", flush=True)
        waiting: dict[int, socket.socket] = {}
        signal.signal(signal.SIGCHLD, lambda *_: report(waiting))
        while listener in select.select([listener, sys.stdin], [], [])[0]:
            if asked := fork(listener, waiting):
                return asked
    os._exit(0)


def report(waiting: dict[int, socket.socket]) -> None:
    """Tell the clients of the processes that have ended their exit codes."""
    with contextlib.suppress(ChildProcessError):
        while (ended := os.waitpid(-1, os.WNOHANG))[0]:
            code = os.waitstatus_to_exitcode(ended[1])
            with waiting.pop(ended[0]) as client, contextlib.suppress(OSError):
                # a process that a signal ended has 128 + its number, as in a shell
                client.sendall(bytes([code if code >= 0 else 128 - code]))


def fork(listener: socket.socket, waiting: dict[int, socket.socket]) -> tuple[Any, ...] | None:
    """Accept one request and fork. Returns the request in the forked process, and None in the server."""
    client = listener.accept()[0]
    head, streams, _, _ = socket.recv_fds(client, 8, 3)
    left, text = int.from_bytes(head, "big"), b""
    while len(text) < left:
        text += client.recv(left - len(text))
    # the end of the process must not be reported before it is known
    signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGCHLD])
    if pid := os.fork():
        waiting[pid] = client
        signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGCHLD])
        for stream in streams:
            os.close(stream)
        return None
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGCHLD])
    for one in (client, *waiting.values()):
        one.close()
    for number, stream in enumerate(streams):
        os.dup2(stream, number)
        os.close(stream)
    return tuple(json.loads(text))


def become(arguments: list[str], folder: str, environment: dict[str, str], python: Path) -> None:
    """Run what the interpreter would run with these arguments."""
    servers, given = _path(os.environ), _path(environment)
    installed = [path for path in sys.path if path not in servers]
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(environment)
    sys.executable = str(python)
    kind, *more = arguments
    if kind == "-m":
        sys.argv, sys.path[:] = more, [folder, *given, *installed]
        runpy.run_module(more[0], run_name="__main__", alter_sys=True)
    elif kind == "-c":
        sys.argv, sys.path[:] = ["-c", *more[1:]], ["", *given, *installed]
        exec(compile(more[0], "<string>", "exec"), {"__name__": "__main__", "__builtins__": __builtins__})
    else:
        sys.argv, sys.path[:] = arguments, [str(Path(kind).resolve().parent), *given, *installed]
        runpy.run_path(kind, run_name="__main__")


def _path(environment: Mapping[str, str]) -> list[str]:
    return [path for path in environment.get("PYTHONPATH", "").split(os.pathsep) if path]


def ended(run: Callable[[], None]) -> int:
    """The exit code of a program, whose threads and exit functions have run when it is known."""
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
    place = Path(sys.argv[1])
    asked = serve(place)
    # the modules are not taken apart, which takes longer than many jobs
    os._exit(ended(lambda: become(*asked, place / "python")))
