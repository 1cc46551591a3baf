"""A pico project in a folder of its own: local model, local texts, a small config, and snakemake to run on them."""
import copy
import os
import re
import subprocess
import sys
from pathlib import Path

import yaml

from tests import forks, pico

ROOT = Path(__file__).resolve().parents[2]
# the rules find planning there too
sys.path.append(str(ROOT / "workflow_scripts"))
CONFIG = {
    "models": {"pico": {"source": "model"}},
    "texts": {"made": {"source": "made.txt", "format": "lines"},
              "heldout": {"source": "heldout.txt", "format": "lines"}},
    "calibrations": {"few": {"length": 24, "seed": 0, "mix": {"made": 40}}},
    "grid": {"models": ["pico"], "calibrations": ["few"], "methods": ["remove", "linear", "kdp"], "ratios": [0.1],
             "k_max": [3]},
    "similarity": {"tokens": 512, "batch": 64},
    "methods": {"remove": {"block": {"sized_as": "kdp"}}, "linear": {}, "linear_sequential": {},
                "kdp": {"kernel": {"features": 32, "epochs": 2, "batch_sequences": 20},
                        "inverse": {"width": 16, "epochs": 2}}},
    "evaluate": {"text": "heldout", "window": 24, "lastword_items": 4, "continuation_items": 12,
                 "tasks": ["heldout_ppl", "heldout_lastword", "heldout_continuation"]},
    "efficiency": {"tokens": 16, "decode_steps": 2, "repeats": 1, "threads": 1},
    "diagnose": {"windows": 2},
    "cache": "cache",
}


class Project:
    """A folder with a pico model, texts and a config."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.config = copy.deepcopy(CONFIG)

    def make(self) -> "Project":
        """Write model and texts."""
        pico.save(self.folder / "model", "llama", width=48)
        (self.folder / "made.txt").write_text("\n".join(pico.documents(120)), encoding="utf-8")
        (self.folder / "heldout.txt").write_text("\n".join(pico.documents(20, seed=1, words=160)), encoding="utf-8")
        return self

    def environment(self) -> dict[str, str]:
        """One thread and no hub, whatever the caller has set."""
        return {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}

    def command(self, *arguments: str) -> list[str]:
        """snakemake on this folder."""
        (self.folder / "config.yaml").write_text(yaml.safe_dump(self.config, sort_keys=False), encoding="utf-8")
        return [sys.executable, "-m", "snakemake", "--snakefile", str(ROOT / "Snakefile"), "--directory",
                str(self.folder), "--workflow-profile", str(ROOT / "profiles" / "default"), *arguments]

    def run(self, *arguments: str, check: bool = True) -> str:
        """Run snakemake and return what it printed; fails the test with that text unless `check` is off.

        Snakemake and its jobs are forked from a process that has imported what they need.
        """
        done = subprocess.run([forks.python(), *self.command(*arguments)[1:]], cwd=self.folder, text=True, check=False,
                              env=self.environment(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        assert not check or done.returncode == 0, done.stdout[-4000:]
        return done.stdout

    def planned(self, *arguments: str) -> dict[str, int]:
        """Rules that a dry run would run, with their number of jobs."""
        text = self.run("--dry-run", *arguments)
        table = re.search(r"^job +count\n[- ]+\n(.*?)^total", text, flags=re.MULTILINE | re.DOTALL)
        return {name: int(count) for name, count in re.findall(r"^(\w+) +(\d+)$", table.group(1), flags=re.MULTILINE)} \
            if table else {}
