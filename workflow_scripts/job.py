"""What every script of the workflow shares: threads, a log, progress lines, one clear line for an error."""
import logging
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

# jobs find kdp_core beside the Snakefile, installed or not
sys.path.append(str(Path(__file__).resolve().parents[1]))

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")


@contextmanager
def job(snakemake: Any) -> Iterator[None]:
    """Run the body with the rule's threads and log; what fails goes to the log whole and to the screen in one line."""
    os.environ["OMP_NUM_THREADS"] = str(snakemake.threads)
    rule, screen = snakemake.rule, logging.StreamHandler(sys.stderr)
    file = logging.FileHandler(snakemake.log[0], mode="w", encoding="utf-8")
    screen.addFilter(lambda record: record.name.startswith("kdp_core"))
    screen.setFormatter(logging.Formatter(f"{rule}: %(message)s"))
    file.setFormatter(logging.Formatter("%(asctime)s %(name)s %(levelname)s %(message)s"))
    logging.basicConfig(level=logging.INFO, handlers=[file, screen], force=True)
    for noisy in ("httpx", "urllib3", "filelock", "fontTools", "matplotlib", "lm_eval", "transformers", "datasets"):
        logging.getLogger(noisy).setLevel(logging.WARNING)
    try:
        _set_threads(snakemake.threads)
        yield
    except Exception as error:
        logging.getLogger().removeHandler(screen)
        logging.exception("failed")
        print(f"{rule}: {type(error).__name__}: {error}\n(whole trace: {snakemake.log[0]})", file=sys.stderr)
        sys.exit(1)


def device_here(name: str) -> str:
    """`auto` as what this machine has: cuda where there is one."""
    # not above, and not kdp_core.models: transformers' models cost seconds
    import torch

    return ("cuda" if torch.cuda.is_available() else "cpu") if name == "auto" else name


def _set_threads(threads: int) -> None:
    """Same threads, same bits: sums depend on how they are split."""
    if "torch" in sys.modules:
        import torch
        import transformers

        torch.set_num_threads(threads)
        transformers.utils.logging.disable_progress_bar()
