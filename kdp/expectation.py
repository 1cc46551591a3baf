"""Predicts how much a pruned checkpoint loses in text generation, compared with its dense model."""
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from rich.table import Table

from kdp import heldout, show, sources
from kdp.record import KEPT
from kdp_core.base import store
from kdp_core.base.measurements import Expectation
from kdp_core.model import checkpoints, intake
from kdp_core.study import expect, single_step

WORDS = {"quality": "mean of all measures", "agreement": "same next tokens as the dense model",
         "lambada": "correct last words of passages", "rouge1": "overlap with human summaries",
         "repetition": "freedom from repetition"}
"""Name of a loss -> its name on the screen."""


class DenseError(ValueError):
    """The dense model of a checkpoint is not known."""


@contextmanager
def dense_of(folder: Path, given: str | None, cache: Path) -> Iterator[Path]:
    """Yield the dense checkpoint from which `folder` was pruned.

    The dense model is `given`. Without `given`, it is a dense checkpoint that is still on disk, or else the model that
    the record of `kdp prune` names.
    """
    # the workflow keeps the dense model at results/{model}/dense, above {calib}/{method}/{point}/checkpoint
    near = [folder / KEPT / "dense", *(parent / "dense" for parent in folder.absolute().parents[3:4])]
    kept = [Path(given).expanduser()] if given else near
    if found := next((path for path in kept if (path / "config.json").is_file()), None):
        yield found
        return
    name = given or _recorded(folder)
    source, sha256 = sources.model(name)
    path = sources.fetch_model(source, sha256, cache, intake.check_folder)
    with tempfile.TemporaryDirectory(prefix="kdp-dense-") as temporary:
        checkpoints.convert(path, Path(temporary) / "dense", dtype="float32", source=source)
        yield Path(temporary) / "dense"


def _recorded(folder: Path) -> str:
    """The source of the dense model, read from the record of `kdp prune` in `folder`.

    For a local model, the record contains only the last part of the path, so the dense model cannot be found.
    """
    summary = folder / KEPT / "summary.json"
    name: str = store.read_json(summary)["settings"]["model"] if summary.is_file() else ""
    if name != sources.DEFAULT and not name.startswith(("hf:", "pypi:")):
        raise DenseError(f"{folder} does not name its dense model; name it by --dense, as a folder or a source")
    return name


def expectation(folder: Path, dense: Path, documents: list[str], *, windows: int, length: int | None,
                device: str) -> Expectation:
    """Predict the losses of the checkpoint in `folder` from its next-token predictions on windows of a text.

    Nothing is generated.
    """
    predictor = expect.own_predictor()
    heldout.check_same_tokens(dense, folder)
    ids_ST = heldout.windows(dense, documents, length or expect.LENGTH)
    return expect.expectation(single_step.measure(dense, folder, ids_ST, windows=windows, device=device), predictor)


def table(found: Expectation) -> Table:
    """A table with the share of each measure of generation that the pruned model is expected to keep."""
    made = show.plain_table("expected to be kept", "%", "range in 9 of 10 cases")
    for name, loss in found.losses.items():
        low, high = found.low[name], found.high[name]
        made.add_row(WORDS[name], f"{100 * (1 - loss):.0f}", f"{100 * (1 - high):.0f} to {100 * (1 - low):.0f}")
    return made
