"""Every script of the workflow runs inside `job`, which sets the threads, the log, the progress lines and the format of
error messages.

A script that contains a training also runs inside `training`, which saves the state of the training on disk.
"""
import hashlib
import json
import logging
import os
import resource
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from planning import refusals

if TYPE_CHECKING:
    from kdp_core.base.resume import Resume

# jobs import kdp_core from the folder next to the Snakefile, whether it is installed or not
sys.path.append(str(Path(__file__).resolve().parents[1]))

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")

SAVE_EVERY_S = 300
"""Time in seconds between two saves of a training's state, unless the config sets `training.save_every_s`."""
BY_CONTENT = 2**20
"""Largest size in bytes of a file that is identified by its content. A larger file is identified by its size and
time."""


@contextmanager
def job(snakemake: Any) -> Iterator[None]:
    """Run the `with` block with the threads and the log of the rule.

    An error is written to the log with its whole trace, and to the screen as one line.
    """
    os.environ["OMP_NUM_THREADS"] = str(snakemake.threads)
    rule, screen = snakemake.rule, logging.StreamHandler(sys.stderr)
    file = logging.FileHandler(snakemake.log[0], mode="w", encoding="utf-8")
    screen.addFilter(lambda record: record.name.startswith("kdp_core"))
    screen.setFormatter(logging.Formatter(f"{rule}: %(message)s"))
    file.setFormatter(logging.Formatter("%(asctime)s %(name)s %(levelname)s %(message)s"))
    logging.basicConfig(level=logging.INFO, handlers=[file, screen], force=True)
    for noisy in ("httpx", "urllib3", "filelock", "fontTools", "matplotlib", "lm_eval", "transformers", "datasets"):
        logging.getLogger(noisy).setLevel(logging.WARNING)
    # SIGTERM of a scheduler raises SystemExit, so that temporary files are removed
    signal.signal(signal.SIGTERM, _leave)
    try:
        _set_threads(snakemake.threads)
        yield
        # Snakemake's benchmark file also has these figures, but not for a job that is forked (forks.py)
        used = resource.getrusage(resource.RUSAGE_SELF)
        logging.getLogger("job").info("done in %.1f s of processor time; peak memory %.0f MB",
                                      used.ru_utime + used.ru_stime, used.ru_maxrss / 1024)
    except Exception as error:
        logging.getLogger().removeHandler(screen)
        logging.exception("failed")
        _refuse(snakemake, error)
        print(f"{rule}: {type(error).__name__}: {error}\n(whole trace: {snakemake.log[0]})", file=sys.stderr)
        sys.exit(1)


def _refuse(snakemake: Any, error: Exception) -> None:
    """Record that the grid point of this job cannot be made.

    If this record cannot be written, the job still shows the error with which it failed.
    """
    try:
        refusals.record(snakemake.rule, dict(snakemake.wildcards.items()), snakemake.config, error)
    except Exception:
        logging.exception("the refusal could not be written down")


def device_here(name: str) -> str:
    """The device that a job uses on this machine. For `auto` and `balanced`, this is cuda if a GPU is available, and
    cpu otherwise. Any other name is returned unchanged.

    `balanced` gives one device, because fits on stored states always run on one device.
    """
    # kdp_core.model.checkpoints is not used here, because its import of transformers takes seconds
    import torch

    here = "cuda" if torch.cuda.is_available() else "cpu"
    return here if name.split(":")[0] in ("auto", "balanced") else name


def _set_threads(threads: int) -> None:
    """Set the number of threads and the library of the matrix products.

    Both split each sum, so two runs give equal bits only with the same number of threads on the same kind of processor.
    """
    if "torch" in sys.modules:
        import torch
        import transformers

        from kdp_core.base import products

        torch.set_num_threads(threads)
        products.choose()
        transformers.utils.logging.disable_progress_bar()


def _leave(number: int, frame: Any) -> None:
    sys.exit(128 + number)


@contextmanager
def training(snakemake: Any) -> Iterator["Resume"]:
    """Yield an object that saves the state of the training in a file. The file of the state is not an output of the
    rule, because snakemake deletes the outputs of a failed job.

    After SIGTERM or Ctrl-C the training finishes its update, saves its state and exits with 128 + the number of the
    signal. This exit code is the code of a killed job. The scheduler therefore treats the stopped job as failed, and
    starts the job again. The saved state is deleted when the training has finished.
    """
    # imported here, because scripts that train nothing need no torch
    from kdp_core.base.resume import Resume, Stopped

    # this value is not a param of the rule: it changes no result, and a changed param would rerun the job
    every_s = snakemake.config.get("training", {}).get("save_every_s", SAVE_EVERY_S)
    path = Path("results", "resume", f"{snakemake.rule}-{Path(snakemake.log[0]).stem}.safetensors")
    kept, asked = Resume(path, _key(snakemake), every_s), []

    def stop(number: int, frame: Any) -> None:
        asked.append(number)
        if not kept.stop():
            _leave(number, frame)

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, stop)
    try:
        yield kept
    except Stopped as stopped:
        logging.getLogger("kdp_core").info("%s", stopped)
        _leave(asked[0], None)
    kept.remove()


def _key(snakemake: Any) -> str:
    """The hash of everything on which a training depends: options, library code, data, versions and processor."""
    import torch

    machine = [torch.__version__, torch.backends.cpu.get_cpu_capability(), torch.get_float32_matmul_precision(),
               snakemake.threads,
               torch.cuda.get_device_name() if torch.cuda.is_available() else None]
    parts = [snakemake.rule, dict(snakemake.wildcards.items()), dict(snakemake.params.items()), machine,
             [_known(Path(path)) for path in snakemake.input]]
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()


def _known(path: Path) -> list[tuple[str, Any]]:
    """The names and fingerprints of all files of an input.

    The fingerprint of a file is its hash. The fingerprint of a large file is its size and its modification time.
    """
    files = sorted(path.rglob("*")) if path.is_dir() else [path]
    return [(str(file), hashlib.sha256(file.read_bytes()).hexdigest() if file.stat().st_size <= BY_CONTENT else
             (file.stat().st_size, file.stat().st_mtime_ns)) for file in files if file.is_file()]
