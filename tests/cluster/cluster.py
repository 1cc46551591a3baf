"""A Slurm of three nodes with two fake GPUs each on this machine: `python tests/cluster/cluster.py start`, then `stop`.

Everything it writes lies in one new folder: configuration, munge key and socket, state, spool, logs. Ports are free
ones, nothing is read from or written to /etc, and a Slurm that already runs here is not touched. Root is not needed.
`start` prints the folder and what to export, `stop FOLDER` ends the daemons and their jobs and removes the folder.
"""
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

NODES = ("n1", "n2", "n3")
CPUS, GPUS, MEMORY_MB = 2, 2, 16000
"""Of a node, whatever this machine has."""
DAEMONS = ("munged", "slurmctld", "slurmd")
PATH = os.pathsep.join([os.environ.get("PATH", os.defpath), "/usr/sbin", "/sbin"])
PATIENCE = 30  # seconds until all nodes must be there
CONFIG = """\
ClusterName=kdp-test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={controller_port}
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
CredType=cred/munge
# a requeued job waits until its old credential is void: 2 minutes unless set
AuthInfo=socket={folder}/munge/socket,cred_expire=10
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd-%n.log
PlugStackConfig={folder}/plugstack.conf
MpiDefault=none
SwitchType=switch/none
TaskPlugin=task/none
ProctrackType=proctrack/linuxproc
AccountingStorageType=accounting_storage/none
# a job that takes more memory than it asked for is killed, as cgroups do elsewhere
JobAcctGatherType=jobacct_gather/linux
JobAcctGatherFrequency=task=1
JobAcctGatherParams=OverMemoryKill
SelectType=select/cons_tres
# the node with the least to do comes first, so that all are used
SelectTypeParameters=CR_Core_Memory,CR_LLN
SlurmdParameters=config_overrides
SchedulerParameters=batch_sched_delay=0,sched_interval=1,bf_interval=1
GresTypes=gpu
KillWait=15
MinJobAge=600
ReturnToService=2
# a node that does not answer for so many seconds is dead
SlurmdTimeout=5
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
{nodes}
PartitionName=main Nodes=ALL Default=YES State=UP PriorityTier=1 PreemptMode=REQUEUE
PartitionName=urgent Nodes=ALL State=UP PriorityTier=2 PreemptMode=OFF
"""
NODE = "NodeName={name} NodeHostname={host} NodeAddr=127.0.0.1 Port={port} CPUs={cpus} RealMemory={memory} " \
       "Gres=gpu:fake:{gpus}"


def missing() -> str | None:
    """Why there can be no cluster here, with the remedy; None where there can."""
    absent = [name for name in (*DAEMONS, "sbatch", "srun", "scontrol") if shutil.which(name, path=PATH) is None]
    return f"{', '.join(absent)} not installed; on Debian: apt-get install slurm-wlm munge" if absent else None


class Cluster:
    """A running cluster, or one of an earlier process, by its folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    @classmethod
    def start(cls, cpus: int = CPUS) -> "Cluster":
        """Start all daemons in a new folder and wait until every node, of so many CPUs, is idle."""
        if reason := missing():
            raise RuntimeError(reason)
        # not below a folder that only its owner may enter: munge refuses to put its socket there
        cluster = cls(Path(tempfile.mkdtemp(prefix="kdp-slurm-")))
        try:
            cluster._configure(cpus)
            munge = cluster.folder / "munge"
            files = [f"--{name}-file={munge}/{name}" for name in ("key", "pid", "log", "seed")]
            cluster._launch("munged", "--foreground", f"--socket={munge}/socket", "--num-threads=2", *files)
            cluster._until(lambda: (munge / "socket").exists(), "munged gives no socket")
            cluster._launch("slurmctld", "-D", "-f", str(cluster.folder / "slurm.conf"))
            for name in NODES:
                cluster.revive(name)
            cluster._until(lambda: set(cluster.states().values()) == {"idle"}, "not all nodes came up")
        except BaseException:
            cluster.stop()
            raise
        return cluster

    def stop(self) -> None:
        """End jobs and daemons, then remove the folder."""
        if self.pids().get("slurmctld"):
            subprocess.run([self._tool("scancel"), "--user", str(os.getuid())], env=self.environment(), check=False,
                           capture_output=True, timeout=PATIENCE)
        for sign in (signal.SIGTERM, signal.SIGKILL):
            # munged last: the others speak through it
            for pid in [*self._of_jobs(), *sorted(self.pids().values(), reverse=True)]:
                _send(pid, sign)
            deadline = time.monotonic() + 5
            while (self.pids() or self._of_jobs()) and time.monotonic() < deadline:
                time.sleep(0.1)
        shutil.rmtree(self.folder, ignore_errors=True)

    def environment(self) -> dict[str, str]:
        """What a process needs to speak to this cluster and to no other."""
        kept = {name: value for name, value in os.environ.items() if not name.startswith(("SLURM", "SBATCH", "SRUN"))}
        path = os.pathsep.join([str(self.folder / "bin"), PATH])
        return {**kept, "PATH": path, "SLURM_CONF": str(self.folder / "slurm.conf")}

    def run(self, *command: str) -> str:
        """The output of one of Slurm's own commands."""
        return subprocess.run(command, env=self.environment(), text=True, capture_output=True, check=True,
                              timeout=PATIENCE).stdout

    def states(self) -> dict[str, str]:
        """State of every node by name; empty while the controller does not answer."""
        try:
            lines = self.run("sinfo", "--partition=main", "--Node", "--noheader", "--format=%N %T").splitlines()
        except subprocess.CalledProcessError:
            return {}
        return dict(line.split() for line in lines)

    def jobs(self) -> dict[str, dict[str, str]]:
        """All jobs that the controller remembers: number -> its fields, such as JobState, NodeList, TimeLimit."""
        lines = self.run("scontrol", "--oneliner", "show", "jobs").splitlines()
        found = [dict(part.split("=", 1) for part in line.split(" ") if "=" in part) for line in lines]
        return {fields["JobId"]: fields for fields in found if "JobId" in fields}

    def kill(self, node: str) -> None:
        """A node dies: its daemon and all that runs on it, at once."""
        for pid in [self.pids()[node], *self._of_jobs(node)]:
            _send(pid, signal.SIGKILL)

    def clear(self) -> None:
        """End all jobs, and bring back the nodes that died."""
        self.run("scancel", "--user", str(os.getuid()))
        for name in set(NODES) - set(self.pids()):
            self.revive(name)
        self._until(lambda: set(self.states().values()) == {"idle"}, "not all nodes came back")

    def revive(self, node: str) -> None:
        """Start a node's daemon."""
        self._launch("slurmd", "-D", "-f", str(self.folder / "slurm.conf"), "-N", node, name=node)

    def pids(self) -> dict[str, int]:
        """Daemons that live, in the order of their start; a number that went to another process does not count."""
        try:
            recorded = json.loads((self.folder / "pids.json").read_text(encoding="utf-8"))
        except FileNotFoundError:
            return {}
        return {name: pid for name, pid in recorded.items() if str(self.folder) in _read(pid, "cmdline")}

    def _of_jobs(self, node: str | None = None) -> list[int]:
        """Processes of jobs, on one node or on all: those that Slurm started with this cluster's configuration."""
        asked = [f"SLURM_CONF={self.folder}/slurm.conf"] + ([f"SLURMD_NODENAME={node}"] if node else [])
        steps = [f"slurmstepd: [{number}." for number in (self._on(node) if node else [])]
        found = []
        for pid in (int(path.name) for path in Path("/proc").iterdir() if path.name.isdigit()):
            environment, command = _read(pid, "environ").split("\0"), _read(pid, "cmdline")
            of_job = any(word.startswith("SLURM_JOB_ID=") for word in environment)
            if of_job and all(word in environment for word in asked):
                found.append(pid)
            elif command.startswith(tuple(steps) if node else "slurmstepd: [") and asked[0] in environment:
                found.append(pid)
        return found

    def _on(self, node: str) -> list[str]:
        return [number for number, fields in self.jobs().items() if fields.get("NodeList") == node]

    def _configure(self, cpus: int) -> None:
        self.folder.chmod(0o755)
        munge = self.folder / "munge"
        munge.mkdir()
        munge.chmod(0o755)
        (munge / "key").write_bytes(os.urandom(128))
        (munge / "key").chmod(0o600)
        (self.folder / "state").mkdir()
        # a GPU is a device file, which CUDA_VISIBLE_DEVICES numbers: these two are on every machine
        for number, device in enumerate(("/dev/null", "/dev/zero")[:GPUS]):
            (self.folder / f"gpu{number}").symlink_to(device)
        host, (controller_port, *ports) = socket.gethostname().split(".")[0], _free_ports(1 + len(NODES))
        nodes = "\n".join(NODE.format(name=name, host=host, port=port, cpus=cpus, gpus=GPUS, memory=MEMORY_MB)
                          for name, port in zip(NODES, ports, strict=True))
        written = {
            "slurm.conf": CONFIG.format(host=host, controller_port=controller_port, folder=self.folder, nodes=nodes,
                                        user=_user()),
            "gres.conf": f"NodeName={','.join(NODES)} Name=gpu Type=fake File={self.folder}/gpu[0-{GPUS - 1}]\n",
            "plugstack.conf": "",
            # snakemake's executor hides SLURM_CONF, among others, from the srun inside a job
            "bin/srun": f'#!/bin/sh\nSLURM_CONF={self.folder}/slurm.conf exec {self._tool("srun")} "$@"\n',
            # there is no accounting: what the executor asks sacct when it has doubts about squeue, squeue answers
            "bin/sacct": "#!/bin/sh\nfor last; do :; done\n"
                         "exec squeue --noheader --states=all --format='%i|%T' --name \"$last\"\n"}
        (self.folder / "bin").mkdir()
        for name, text in written.items():
            (self.folder / name).write_text(text, encoding="utf-8")
        for tool in (self.folder / "bin").iterdir():
            tool.chmod(0o755)

    def _launch(self, *command: str, name: str = "") -> None:
        with (self.folder / "daemons.log").open("a") as log:
            process = subprocess.Popen([self._tool(command[0]), *command[1:]], env=self.environment(), stdout=log,
                                       stderr=log, stdin=subprocess.DEVNULL, start_new_session=True, cwd=self.folder)
        live = {**self.pids(), name or command[0]: process.pid}
        (self.folder / "pids.json").write_text(json.dumps(live), encoding="utf-8")

    def _until(self, condition, complaint: str) -> None:
        deadline = time.monotonic() + PATIENCE
        while not condition():
            if time.monotonic() > deadline:
                said = (self.folder / "daemons.log").read_text(encoding="utf-8", errors="replace")
                raise RuntimeError(f"{complaint}\n{said[-4000:]}")
            time.sleep(0.1)

    def _tool(self, name: str) -> str:
        return shutil.which(name, path=PATH) or name


def _read(pid: int, name: str) -> str:
    """A file of a process in /proc; empty where it is gone, a zombie or another user's."""
    try:
        return Path(f"/proc/{pid}/{name}").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""


def _send(pid: int, sign: signal.Signals) -> None:
    try:
        os.kill(pid, sign)
    except ProcessLookupError:
        pass


def _user() -> str:
    import pwd

    return pwd.getpwuid(os.getuid()).pw_name


def _free_ports(count: int) -> list[int]:
    """Ports that nobody listens on, found all at once so that they differ."""
    sockets = [socket.socket() for _ in range(count)]
    try:
        for one in sockets:
            one.bind(("", 0))
        return [one.getsockname()[1] for one in sockets]
    finally:
        for one in sockets:
            one.close()


def main(arguments: list[str]) -> int:
    """`start`, or `stop FOLDER`."""
    if arguments == ["start"]:
        if reason := missing():
            print(reason, file=sys.stderr)
            return 1
        cluster = Cluster.start()
        print(f"export SLURM_CONF={cluster.folder}/slurm.conf PATH={cluster.folder}/bin:$PATH")
        print(f"# stop it: python {sys.argv[0]} stop {cluster.folder}")
        return 0
    if len(arguments) == 2 and arguments[0] == "stop" and (Path(arguments[1]) / "pids.json").exists():
        Cluster(Path(arguments[1])).stop()
        return 0
    print("usage: cluster.py start, or cluster.py stop FOLDER with the folder that start named", file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
