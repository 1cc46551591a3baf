"""The launcher: one run at a time, goes on after kill -9, ends by naming the results."""
import os
import shutil
import signal
import subprocess
import sys
import time

import pytest

from tests.workflow.project import ROOT

SNAKEFILE = """
rule slow:
    output: "done.txt"
    shell: "touch started; while [ ! -e go ]; do sleep 0.1; done; touch {output}"
"""


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "workflow_scripts").mkdir()
    for name in ("launch.py", "forks.py"):
        shutil.copy(ROOT / "workflow_scripts" / name, tmp_path / "workflow_scripts")
    (tmp_path / "Snakefile").write_text(SNAKEFILE)
    return tmp_path


def command(folder):
    return [sys.executable, str(folder / "workflow_scripts" / "launch.py"), "--cores", "1", "--rerun-incomplete"]


def finished(folder):
    return subprocess.run(command(folder), text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, check=False)


def started(folder):
    process = subprocess.Popen(command(folder), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
                               start_new_session=True)
    deadline = time.monotonic() + 60
    while not (folder / "started").exists():
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.05)
    return process


def test_a_second_run_is_refused_and_a_killed_one_is_gone_on_with(folder):
    process = started(folder)
    refused = finished(folder)
    assert refused.returncode == 1 and "another run is working in this folder" in refused.stdout
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    (folder / "go").touch()
    done = finished(folder)  # at once: the launcher itself waits until the killed run is truly gone
    assert done.returncode == 0 and (folder / "done.txt").exists(), done.stdout
    assert "results/report.html" in done.stdout and "results/summary.csv" in done.stdout


def test_a_run_whose_launcher_alone_was_killed_still_holds_the_folder(folder):
    process = started(folder)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    refused = finished(folder)
    assert refused.returncode == 1 and "another run" in refused.stdout
    (folder / "go").touch()
    deadline = time.monotonic() + 60
    while (done := finished(folder)).returncode and time.monotonic() < deadline:
        time.sleep(0.2)
    assert done.returncode == 0, done.stdout


def test_failure_is_passed_on(folder):
    (folder / "Snakefile").write_text('rule broken:\n    output: "x"\n    shell: "exit 3"\n')
    done = finished(folder)
    assert done.returncode != 0 and "results/report.html" not in done.stdout


def test_the_error_of_the_job_is_the_last_line(folder):
    (folder / "Snakefile").write_text(f"""
import sys
sys.path.insert(0, {str(ROOT / "workflow_scripts")!r})
from planning import failures
onerror:
    for reason in failures.reasons([str(path) for path in log]):
        failures.say_last(reason)
rule broken:
    output: "x"
    log: "results/logs/broken/x.log"
    shell: "echo 'kdp_core.model.intake.ModelError: too small; choose another' > {{log}}; exit 3"
""")
    done = finished(folder)
    assert done.returncode != 0
    assert done.stdout.strip().splitlines()[-1] == \
        "broken: ModelError: too small; choose another (whole trace: results/logs/broken/x.log)"


@pytest.mark.skipif(sys.platform != "linux", reason="jobs are forked on Linux only")
@pytest.mark.parametrize(("arguments", "forked"), [((), "True"), (("--executor", "local"), "False")])
def test_jobs_are_forked_unless_they_may_run_elsewhere(folder, arguments, forked):
    (folder / "Snakefile").write_text('rule said:\n    output: "done.txt"\n    script: "said.py"\n')
    (folder / "said.py").write_text("import sys\nopen(snakemake.output[0], 'w').write(str('torch' in sys.modules))\n")
    done = subprocess.run([*command(folder), *arguments], text=True, capture_output=True, check=False)
    assert done.returncode == 0, done.stderr
    assert (folder / "done.txt").read_text() == forked


@pytest.mark.parametrize("arguments, limit", [([], "None"), (["--max-jobs-per-timespan", "5/1s"], "5")])
def test_only_a_given_limit_of_jobs_a_second_is_held(folder, arguments, limit):
    """With a limit, Snakemake looks at all ready jobs once a second for every job that has ended."""
    (folder / "go").touch()
    (folder / "Snakefile").write_text(SNAKEFILE + """
onsuccess:
    limit = workflow.scheduling_settings.max_jobs_per_timespan
    open("limit", "w").write(str(limit and limit.max_jobs))
""")
    done = subprocess.run([*command(folder), *arguments], text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                          check=False)
    assert done.returncode == 0, done.stdout
    assert (folder / "limit").read_text() == limit
