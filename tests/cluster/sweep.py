"""The pico project as a small sweep, on this machine or on a cluster, and the comparison of its results."""
import hashlib
import json
import os
import signal
import subprocess
import time
from pathlib import Path

from kdp_core.base import provenance, store
from kdp_core.model import assets
from tests.cluster.cluster import Cluster
from tests.workflow.project import ROOT, Project

FEW = "results/pico/few"
HIDDEN = f"{FEW}/hidden.zarr"
KERNEL = f"{FEW}/kdp/blocks/7-9/kernel.safetensors"
KERNEL_LOG = "results/logs/step/pico-few-kdp-7-9-kernel.log"
PATIENCE = 900  # seconds until a run must have come to some point, on a machine with much else to do
EAGER = {"slurm-init-seconds-before-status-checks": 1, "seconds-between-status-checks": 1, "latency-wait": 10,
         "max-status-checks-per-second": 5, "max-jobs-per-timespan": "100/1s"}
"""Options of a test, which may ask often because the login node is its own."""


class Sweep(Project):
    """Two methods at two ratios, on a model that runs on a GPU where there is one."""

    def __init__(self, folder: Path, cluster: Cluster | None) -> None:
        super().__init__(folder)
        self.cluster = cluster
        self.begun: list[subprocess.Popen] = []
        self.config["models"]["pico"]["device"] = "auto"
        self.config["grid"] |= {"methods": ["linear", "kdp"], "ratios": [0.1, 0.2]}
        # long enough to be caught in the middle of step 1
        self.config["methods"]["kdp"]["kernel"] |= {"epochs": 60, "batch_sequences": 4}

    def environment(self) -> dict[str, str]:
        """That of the cluster, too."""
        return {**super().environment(), **(self.cluster.environment() if self.cluster else {}),
                "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}

    def command(self, *arguments: str) -> list[str]:
        """The command of snakemake. On a cluster it uses the profile and asks for the status more often."""
        eager = [f"--{name}={value}" for name, value in EAGER.items()]
        profile = ["--profile", str(ROOT / "profiles" / "slurm"), *eager] if self.cluster else []
        return super().command(*arguments, *profile)

    def targets(self) -> list[str]:
        """The pruned models of all grid points."""
        return [f"{FEW}/{method}/r{ratio}-k3/pruned.json" for method in self.config["grid"]["methods"]
                for ratio in self.config["grid"]["ratios"]]

    def begin(self, *arguments: str) -> subprocess.Popen:
        """Start snakemake in a process group of its own, its output in a file of the folder."""
        with (self.folder / "screen.txt").open("a") as screen:
            self.begun.append(subprocess.Popen(self.command(*arguments), cwd=self.folder, env=self.environment(),
                                               stdout=screen, stderr=subprocess.STDOUT, start_new_session=True))
        return self.begun[-1]

    def end(self, process: subprocess.Popen) -> str:
        """Wait until snakemake has succeeded; what it printed."""
        code = process.wait(timeout=PATIENCE)
        said = (self.folder / "screen.txt").read_text(encoding="utf-8")
        assert code == 0, said[-6000:]
        return said

    def leave(self) -> None:
        """End what still runs: snakemake, and the jobs of the cluster."""
        for process in self.begun:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
        self.cluster.clear()

    def until(self, condition, what: str):
        """Wait until the condition gives a true value, and return it."""
        deadline = time.monotonic() + PATIENCE
        while not (found := condition()):
            assert time.monotonic() < deadline, f"{what}\n{(self.folder / 'screen.txt').read_text()[-6000:]}"
            time.sleep(0.05)
        return found

    def in_step_1(self) -> str:
        """The number of the Slurm job that is in the middle of step 1, once one is."""
        log = self.folder / KERNEL_LOG
        self.until(lambda: log.exists() and "epoch 3 of" in log.read_text(encoding="utf-8"), "step 1 does not train")
        return self.job("RUNNING")

    def job(self, *states: str) -> str:
        """The number of the only job of step 1 in one of these states, once there is one."""
        number, = self.until(lambda: [number for number, fields in self.of_step_1().items()
                                      if fields["JobState"] in states], f"no job is {' or '.join(states)}")
        return number

    def of_step_1(self) -> dict[str, dict[str, str]]:
        """This folder's jobs of step 1 on the one block."""
        return {number: fields for number, fields in self.cluster.jobs().items()
                if fields["WorkDir"] == str(self.folder) and "7_9_kernel" in fields["Comment"].replace("-", "_")}

    def pause(self, number: str) -> int | None:
        """Halt the script of a job of step 1, as if it hung. Returns its process, or None if the job has ended."""
        found = self.until(lambda: [int(path.name) for path in Path("/proc").iterdir()
                                    if path.name.isdigit() and _runs(path, self.cluster, number, "step.py")]
                           or self.of_step_1()[number]["JobState"] != "RUNNING", "the script of step 1 does not start")
        if found is True:
            return None
        os.kill(found[0], signal.SIGSTOP)
        return found[0]

    def bits(self, below: str = FEW) -> dict[str, list]:
        """What all results of a folder hold but for seconds: hashes of weights and states, records as values."""
        paths = sorted(path for path in (self.folder / below).rglob("*")
                       if path.is_file() and path.name != ".snakemake_timestamp")
        return {str(path.relative_to(self.folder)): _bits(path) for path in paths}


def _bits(path: Path) -> list:
    if path.suffix == ".safetensors" and path.name != "model.safetensors":
        return _plain(store.read(path))
    if path.suffix == ".json" and "record" in store.read_json(path):
        return _plain(store.read(path))
    if path.name == provenance.MADE:
        # its inputs are hashes of records, which hold seconds; the records themselves are compared
        return _plain({key: value for key, value in store.read_json(path).items() if key != "inputs"})
    if path.parent.name == "scored":
        # a record of the evaluation: the first line has seconds, the others are answers
        head, *rest = path.read_text(encoding="utf-8").splitlines()
        return [_plain(json.loads(head)), *rest]
    return [assets.sha256_of(path)]


def _plain(value) -> list:
    """A record as nested lists without seconds, tensors as hashes of their bytes."""
    if hasattr(value, "_asdict"):
        value = value._asdict()
    if isinstance(value, dict):
        return [[key, _plain(item)] for key, item in value.items() if "seconds" not in key]
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if hasattr(value, "numpy"):
        return [str(value.dtype), tuple(value.shape), hashlib.sha256(value.numpy().tobytes()).hexdigest()]
    return [value]


def _runs(process: Path, cluster: Cluster, number: str, script: str) -> bool:
    """Whether a process is the Python of a script in this job, and not a shell or snakemake that names it."""
    try:
        words, variables = ((process / name).read_text(encoding="utf-8", errors="replace").split("\0")
                            for name in ("cmdline", "environ"))
        return len(words) > 1 and words[1].endswith(f".{script}") and {
            f"SLURM_JOB_ID={number}", f"SLURM_CONF={cluster.folder}/slurm.conf"} <= set(variables)
    except OSError:
        return False
