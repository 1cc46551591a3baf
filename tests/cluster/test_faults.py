"""Faults on a real Slurm: whatever stops a job or snakemake, the results have the bits of an undisturbed run."""
import os
import signal
import subprocess
import sys

import pytest

from tests.cluster.cluster import CPUS, NODES
from tests.cluster.sweep import HIDDEN, KERNEL, KERNEL_LOG, Sweep


def same(sweep: Sweep, undisturbed: Sweep, target: str) -> bool:
    """Whether a file or folder has the bits of the undisturbed run's."""
    ours, theirs = ({name: value for name, value in one.bits().items() if name.startswith(target)}
                    for one in (sweep, undisturbed))
    return bool(theirs) and ours == theirs


def test_a_cancelled_job_is_retried_with_more_memory_and_time(prepared, undisturbed):
    run = prepared.begin(KERNEL)
    first = prepared.in_step_1()
    prepared.cluster.run("scancel", first)
    prepared.end(run)
    (_, before), (_, after) = sorted(prepared.of_step_1().items(), key=lambda job: int(job[0]))
    assert before["JobState"] == "CANCELLED" and after["JobState"] == "COMPLETED"
    assert before["TimeLimit"] == "01:00:00" and after["TimeLimit"] == "02:00:00"
    memory = [int(fields["MinMemoryNode"].rstrip("M")) for fields in (before, after)]
    assert memory[1] == pytest.approx(1.5 * memory[0], abs=2)
    assert same(prepared, undisturbed, KERNEL)


def test_a_job_past_its_time_limit_is_retried_with_more(prepared, undisturbed):
    # the signal before the limit is left out, so that the limit itself is met; a minute is Slurm's least
    run = prepared.begin(KERNEL, "--set-resources", "step:runtime=1 if attempt == 1 else 60", "step:slurm_extra=''")
    first = prepared.job("RUNNING")
    prepared.pause(first)
    prepared.end(run)
    jobs = prepared.of_step_1()
    assert jobs.pop(first)["JobState"] == "TIMEOUT"
    (fields,) = jobs.values()
    assert fields["JobState"] == "COMPLETED" and fields["TimeLimit"] == "01:00:00"
    assert same(prepared, undisturbed, KERNEL)


def test_a_job_told_to_end_writes_its_state_and_the_retry_goes_on(prepared, undisturbed):
    run = prepared.begin(KERNEL)
    first = prepared.in_step_1()
    # what --signal does two minutes before the limit
    prepared.cluster.run("scancel", "--signal=TERM", first)
    prepared.end(run)
    assert prepared.cluster.jobs()[first]["JobState"] == "FAILED"
    assert same(prepared, undisturbed, KERNEL)
    assert "resumed at epoch" in (prepared.folder / KERNEL_LOG).read_text(encoding="utf-8")


def test_a_job_killed_for_memory_is_retried_with_more(prepared, undisturbed):
    # no Python with torch fits into the first of these
    run = prepared.begin(KERNEL, "--set-resources", "step:mem_mb=100 if attempt == 1 else 3000")
    prepared.end(run)
    (number, before), (_, after) = sorted(prepared.of_step_1().items(), key=lambda job: int(job[0]))
    assert before["JobState"] != "COMPLETED" == after["JobState"]
    said = (prepared.cluster.folder / f"slurmd-{before['NodeList']}.log").read_text(encoding="utf-8")
    assert f"StepId={number}" in said and "exceeded" in said.lower()
    assert same(prepared, undisturbed, KERNEL)


def test_a_job_whose_node_dies_runs_on_another(prepared, undisturbed):
    run = prepared.begin(KERNEL)
    number = prepared.in_step_1()
    dead = prepared.cluster.jobs()[number]["NodeList"]
    prepared.cluster.kill(dead)
    prepared.end(run)
    fields = prepared.cluster.jobs()[number]
    assert fields["Restarts"] == "1" and fields["NodeList"] in set(NODES) - {dead}
    assert list(prepared.of_step_1()) == [number]
    assert same(prepared, undisturbed, KERNEL)


def test_a_preempted_job_is_requeued(prepared, undisturbed):
    run = prepared.begin(KERNEL)
    number = prepared.in_step_1()
    prepared.cluster.run("sbatch", "--partition=urgent", f"--nodes={len(NODES)}", f"--ntasks-per-node={CPUS}",
                         "--exclusive", "--output=/dev/null", "--wrap=true")
    prepared.end(run)
    fields = prepared.cluster.jobs()[number]
    assert fields["JobState"] == "COMPLETED" and fields["Restarts"] == "1"
    assert list(prepared.of_step_1()) == [number]
    assert same(prepared, undisturbed, KERNEL)


def test_snakemake_killed_and_started_again_while_its_job_runs(prepared, undisturbed):
    run = prepared.begin(KERNEL)
    first = prepared.in_step_1()
    script = prepared.pause(first)
    os.killpg(run.pid, signal.SIGKILL)
    run.wait()
    prepared.end(prepared.begin("--unlock"))
    again = prepared.begin(KERNEL)
    prepared.until(lambda: len(prepared.of_step_1()) == 2, "the job is not submitted again")
    # both jobs are there now, and both write
    assert prepared.of_step_1()[first]["JobState"] == "RUNNING"
    os.kill(script, signal.SIGCONT)
    prepared.end(again)
    prepared.until(lambda: all(fields["JobState"] == "COMPLETED" for fields in prepared.of_step_1().values()),
                   "not both jobs ended well")
    assert same(prepared, undisturbed, KERNEL)


def test_a_second_run_in_the_same_folder_is_refused(prepared, undisturbed):
    run = prepared.begin(KERNEL)
    # snakemake takes seconds to start: a job that is not halted may have ended by then, and the first run with it
    script = prepared.pause(prepared.job("RUNNING"))
    second = subprocess.run(prepared.command(KERNEL), cwd=prepared.folder, env=prepared.environment(), text=True,
                            capture_output=True, check=False)
    os.kill(script, signal.SIGCONT)
    assert second.returncode != 0 and "lock" in second.stdout + second.stderr
    prepared.end(run)
    assert len(prepared.of_step_1()) == 1
    assert same(prepared, undisturbed, KERNEL)


@pytest.fixture
def small_disk(prepared):
    """A file system of its own below the results, smaller than the states; grows when called."""
    folder = prepared.folder / "results/pico/few"
    kept = {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}
    mount = ["mount", "-t", "tmpfs", "-o", "size=512k", "tmpfs", str(folder)]
    if not sys.platform.startswith("linux") or subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("only who may mount a file system can fill one")
    for name, content in kept.items():
        (folder / name).write_bytes(content)
    yield lambda: subprocess.run(["mount", "-o", "remount,size=64m", str(folder)], check=True)
    subprocess.run(["umount", "--lazy", str(folder)], check=True)


def test_a_disk_full_in_the_middle_of_extraction(small_disk, prepared, undisturbed):
    failed = prepared.begin(HIDDEN, "--retries", "0")
    assert failed.wait() != 0
    log = (prepared.folder / "results/logs/hidden/pico-few.log").read_text(encoding="utf-8")
    assert "No space left on device" in log and "hidden states: " in log
    assert not [path.name for path in (prepared.folder / HIDDEN).parent.iterdir() if "hidden" in path.name]
    small_disk()
    prepared.end(prepared.begin(HIDDEN))
    assert same(prepared, undisturbed, HIDDEN)
