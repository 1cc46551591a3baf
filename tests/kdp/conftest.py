"""The command line on pico models: a runner, texts on disk, and one finished pruning for the tests that read it."""
import json
from pathlib import Path
from typing import NamedTuple

import pytest
from typer.testing import CliRunner

from kdp.app import app
from tests import pico

SMALL = ("--sequences", "40", "--length", "24", "--ratio", "0.2")
RESIDUAL = ("--method", "kdp_residual", "--option", "search.entries=8", "--option", "search.judge_sequences=4",
            "--option", "compose.entries=8", "--option", "compose.lr=0.01", "--option", "compose.heldout=0.2")


class Given(NamedTuple):
    """What a user has: a model and two texts."""
    model: Path
    calibration: Path
    heldout: Path

    def prune(self, out, *more):
        """The arguments of a small pruning."""
        return ["prune", str(self.model), "--calibration", str(self.calibration), "--heldout", str(self.heldout),
                "--out", str(out), *SMALL, *more]


def call(*arguments):
    """Run a command; the result has exit_code, stdout and stderr."""
    return CliRunner().invoke(app, [str(one) for one in arguments])


def fails(*arguments):
    """The one line of an error: exit code 1, no traceback."""
    result = call(*arguments)
    assert result.exit_code == 1, result.output
    line, = result.stderr.splitlines()
    assert line.startswith("kdp: ") and "Traceback" not in line
    return line


@pytest.fixture(scope="session")
def given(llama_folder, tmp_path_factory):
    folder = tmp_path_factory.mktemp("texts")
    for name, seed in (("calibration", 0), ("heldout", 1)):
        lines = [json.dumps({"text": document}) for document in pico.documents(160 if seed == 0 else 20, seed)]
        (folder / f"{name}.jsonl").write_text("\n".join(lines))
    return Given(llama_folder, folder / "calibration.jsonl", folder / "heldout.jsonl")


@pytest.fixture(scope="session")
def finished(given, tmp_path_factory):
    """A pruning by kdp_residual that ran to its end, and what it printed."""
    out = tmp_path_factory.mktemp("finished") / "out"
    result = call(*given.prune(out, *RESIDUAL, "--keep"))
    assert result.exit_code == 0, result.output
    return out, result.stdout
