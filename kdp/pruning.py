"""The stages of `kdp prune`. Each record is kept in DIR/.kdp, so that an interrupted run continues where it stopped.

Every record is written atomically: a record on disk is complete, and its stage does not run again. DIR contains one
pruning with fixed settings; `kdp prune` refuses to continue it with other settings. The dense checkpoint and the states
are large; at the end they are deleted unless `keep` is set.
"""
import hashlib
import json
import os
import shutil
import signal
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from torch import Tensor

from kdp import about, heldout, sources
from kdp_core import methods
from kdp_core.base import provenance, store, texts
from kdp_core.base.records import ModelFacts, Tokens
from kdp_core.base.resume import Resume
from kdp_core.model import checkpoints, families, intake
from kdp_core.prune import pruning
from kdp_core.score import efficiency
from kdp_core.study import planner, reach

KEPT = ".kdp"
"""The folder of the records, in the folder of the pruned checkpoint."""
PLAIN = ("facts", "search", "plan", "pruned", "efficiency")
"""Records without tensors."""
LARGE = ("dense", "hidden.zarr")
REPEATS = 5
"""Number of timed runs of each model in the measurement of latency, as in config.yaml."""
SAVE_EVERY_S = 60.0
"""Time in seconds between two saves of a training's state."""


class PruneError(ValueError):
    """A pruning cannot be run with the given settings."""


class Settings(NamedTuple):
    """The settings of a pruning from the command line, which together determine the result."""
    model: str
    calibration: str
    heldout: str
    method: str
    ratio: float
    k_max: int
    sequences: int
    length: int
    seed: int
    dtype: str
    options: dict[str, dict[str, Any]]


class Show(Protocol):
    """The object that shows the progress to the user."""

    def begin(self, stage: str) -> None:
        """Show that this stage begins and that the previous stage has ended."""

    def found(self, stage: str) -> None:
        """Show that the record of this stage is already on disk."""


def options_of(method: str, given: dict[str, dict[str, Any]], *, thorough: bool) -> dict[str, dict[str, Any]]:
    """The options of a pruning. Without `thorough`, the method's quick setting adds options that are not given."""
    quick = {} if thorough else methods.method_of(method).quick
    return {part: {**quick.get(part, {}), **given.get(part, {})} for part in dict.fromkeys([*quick, *given])}


# Checks ---------------------------------------------------------------------------------------------------------------

def check(settings: Settings, out: Path, device: str) -> None:
    """Raise an error for settings that cannot be run, before anything is fetched.

    The error's message is one sentence.
    """
    methods.check_options(settings.method, settings.options)
    if not 0 < settings.ratio < 1:
        raise PruneError(f"--ratio is {settings.ratio:g}; give a share of the parameters between 0 and 1, such as 0.25")
    for name, least in (("sequences", 2), ("length", 2), ("k_max", 2), ("seed", 0)):
        if getattr(settings, name) < least:
            raise PruneError(f"--{name.replace('_', '-')} is {getattr(settings, name)}; give at least {least}")
    checkpoints.torch_dtype(settings.dtype)
    checkpoints.resolve_device(device)
    sources.model(settings.model)
    sources.text(settings.calibration, "--calibration", sources.CALIBRATION)
    sources.text(settings.heldout, "--heldout", sources.HELDOUT)
    check_out(out, settings)
    with tempfile.TemporaryDirectory(prefix="kdp-") as place:
        try:
            facts = planner.described(sources.model(settings.model)[0], out / KEPT / "dense", Path(place))
        except (OSError, ValueError, KeyError):
            # the model is not known yet, or kdp cannot read it; the user learns this when the model is fetched
            return
        refuse(settings, facts, Path(place))


def refuse(settings: Settings, facts: ModelFacts, described: Path) -> None:
    """Raise PruneError if the method refuses this pruning of the model; the model's config.json is in `described`."""
    if why := reach.refusal(settings.method, reach.Case(facts, described, settings.sequences, settings.length),
                            ratio=settings.ratio, k_max=settings.k_max, options=settings.options):
        raise PruneError(why)


def check_out(out: Path, settings: Settings) -> None:
    """Raise PruneError for a folder that contains anything other than this pruning."""
    begun = out / KEPT / "settings.json"
    if out.exists() and not out.is_dir():
        raise PruneError(f"--out is {out}, which is a file; name a folder")
    if not begun.is_file():
        if out.is_dir() and any(out.iterdir()):
            raise PruneError(f"--out is {out}, which contains other files; name a new folder or an empty one")
        return
    before, now = store.read_json(begun), named(settings)
    for name in now:
        if before.get(name) != now[name]:
            raise PruneError(f"{out} contains a pruning with {name} {before.get(name)!r}, not {now[name]!r}; name "
                             "another folder, or delete this one")


def named(settings: Settings) -> dict[str, Any]:
    """The settings in the form in which they are stored.

    Of a local path, only the last part is stored. The entry `sources` is a hash of the three source strings with their
    whole paths.
    """
    sourced = {name: getattr(settings, name) for name in ("model", "calibration", "heldout")}
    bare = {name: provenance.without_place(source) for name, source in sourced.items()}
    digest = hashlib.sha256(json.dumps(sourced).encode()).hexdigest()[:12]
    return {**settings._asdict(), **bare, "sources": digest}


def check_size(option: str, given: str, documents: list[str], tokens: int) -> None:
    """Raise PruneError if a text is too short: it has fewer bytes than `tokens`, the requested number of tokens.

    This check does not need the model.
    """
    # a token has at least one byte, and one token may be added between two documents
    most = sum(len(document.encode()) + 1 for document in documents)
    if most < tokens:
        raise PruneError(f"--{option} is {provenance.without_place(given)!r}, a text of {most} bytes, which are "
                         f"too few for {tokens} tokens; name a longer text, or lower --sequences or --length")


def refuse_family(method: str, folder: Path) -> None:
    """Raise an error for a checkpoint folder that the method cannot prune; only its configuration is read."""
    intake.check_folder(folder)
    family = families.family_of(json.loads((folder / "config.json").read_text(encoding="utf-8")))
    if why := methods.method_of(method).refuses(family):
        raise PruneError(f"method {method} cannot prune a {family.name} model: {why}; `kdp methods` lists all methods")


# Stages ---------------------------------------------------------------------------------------------------------------

class Run:
    """One pruning in the folder `out`."""

    def __init__(self, settings: Settings, out: Path, cache: Path, device: str, show: Show) -> None:
        self.settings, self.out, self.cache, self.device, self.show = settings, out, cache, device, show
        self.kept = out / KEPT
        self.resume = Resume(self.kept / "training.safetensors", json.dumps(named(settings)), SAVE_EVERY_S)

    def keep(self, name: str, make: Callable[[], Any]) -> Any:
        """Read the record `name` from disk.

        If the file does not exist yet, `make` first computes the record, and the record is written to the file.
        """
        path = self.kept / f"{name}.{'json' if name in PLAIN else 'safetensors'}"
        if path.exists():
            self.show.found(name)
        else:
            self.show.begin(name)
            store.write(path, make())
            self.resume.remove()
            self.resume.earlier_s = 0.0
        return store.read(path)

    def plain(self, name: str, make: Callable[[], Any]) -> Any:
        """Read the value `name` from its JSON file.

        If the file does not exist yet, `make` first computes the value, and the value is written to the file.
        """
        path = self.kept / f"{name}.json"
        if path.exists():
            self.show.found(name)
        else:
            self.show.begin(name)
            store.write_json(path, make())
        return store.read_json(path)

    def documents(self, name: str, given: str, default: sources.Text) -> tuple[str, list[str]]:
        """The name and the documents of a text."""
        text = sources.text(given, f"--{name}", default)
        return text.name, self.plain(name, lambda: sources.documents(text, self.cache))

    def facts(self) -> ModelFacts:
        """Read the record of facts about the dense checkpoint.

        If the dense checkpoint does not exist, the model is fetched and converted first.
        """
        if not (self.kept / "dense").exists():
            (self.kept / "facts.json").unlink(missing_ok=True)
        facts: ModelFacts = self.keep("facts", self._convert)
        return facts

    def _convert(self) -> ModelFacts:
        source, sha256 = sources.model(self.settings.model)
        path = sources.fetch_model(source, sha256, self.cache, lambda folder: refuse_family(self.settings.method,
                                                                                             folder))
        made = checkpoints.convert(path, self.kept / "dense", dtype=self.settings.dtype, source=source)
        refuse_family(self.settings.method, self.kept / "dense")
        return made

    def pack(self, name: str, documents: list[str], facts: ModelFacts) -> Tokens:
        """The calibration sequences."""
        part = texts.Part(name, documents, self.settings.sequences)
        dense = self.kept / "dense"
        return texts.pack(checkpoints.load_tokenizer(dense), [part], length=self.settings.length,
                          seed=self.settings.seed, vocabulary=facts.vocabulary,
                          start=families.first_token(checkpoints.config_of(dense)))

    def prune(self) -> dict[str, Any]:
        """Run the stages that are not done yet; return the summary."""
        own = self.settings
        store.write_json(self.kept / "settings.json", named(own))
        name, documents = self.documents("calibration", own.calibration, sources.CALIBRATION)
        _, held = self.documents("heldout", own.heldout, sources.HELDOUT)
        check_size("calibration", own.calibration, documents, own.sequences * own.length)
        check_size("heldout", own.heldout, held, own.length)
        facts = self.facts()
        refuse(own, facts, self.kept / "dense")
        # a text that is too short is refused here, before the states are extracted
        ids_ST = heldout.windows(self.kept / "dense", held, own.length)
        tokens = self.keep("tokens", lambda: self.pack(name, documents, facts))
        (self.show.found if (self.kept / "hidden.zarr").exists() else self.show.begin)("states")
        pruned = pruning.stages(self.kept, tokens, facts, self.kept / "checkpoint", method=own.method, ratio=own.ratio,
                                k_max=own.k_max, options=own.options, keep=self.keep, device=self.device,
                                dtype=own.dtype, resume=self.resume, model_layers=facts.layers)
        self._publish()
        found = {"settings": named(own), "facts": facts._asdict(), "pruned": pruned._asdict(),
                 **self._measure(ids_ST), "tokens_sha256": tokens.provenance["sha256"],
                 "heldout_sha256": hashlib.sha256(ids_ST.numpy().tobytes()).hexdigest(), **provenance.here()}
        about.write(self.out, found, facts, pruned)
        return found

    def _publish(self) -> None:
        """Move the files of the checkpoint to `out`.

        The file config.json is moved last: a folder with this file is a complete checkpoint.
        """
        if (made := self.kept / "checkpoint").is_dir():
            for path in sorted(made.iterdir(), key=lambda path: (path.name == "config.json", path.name)):
                os.replace(path, self.out / path.name)
            made.rmdir()

    def _measure(self, ids_ST: Tensor) -> dict[str, Any]:
        """Perplexity of the dense and the pruned model on the same windows, and the costs of both models."""
        dense, device, dtype = self.kept / "dense", self.device, self.settings.dtype

        def scored(folder: Path) -> dict[str, Any]:
            return heldout.perplexity(folder, ids_ST, device=device, dtype=dtype)._asdict()

        found = {"ppl_dense": self.plain("ppl_dense", lambda: scored(dense)),
                 "ppl_pruned": self.plain("ppl_pruned", lambda: scored(self.out))}
        measured = self.keep("efficiency", lambda: efficiency.measure(
            dense, self.out, tokens=tokens_of(self.settings.length), repeats=REPEATS, device=device, dtype=dtype))
        return {**found, "efficiency": measured._asdict()}


def tokens_of(length: int) -> int:
    """Number of tokens of the prompt whose latency is measured: the length of a sequence, at most 128."""
    return min(length, 128)


def prune(settings: Settings, out: Path, *, cache: Path, device: str, keep: bool, show: Show) -> dict[str, Any]:
    """Run `kdp prune` with these settings and return its summary.

    If the pruning is already finished, the function only reads the summary.
    """
    check(settings, out, device)
    run = Run(settings, out, cache, device, show)
    with stoppable(run.resume):
        summary = run.kept / "summary.json"
        if not summary.exists():
            store.write_json(summary, run.prune())
    if not keep:
        for name in LARGE:
            shutil.rmtree(run.kept / name, ignore_errors=True)
    found: dict[str, Any] = store.read_json(summary)
    return found


@contextmanager
def stoppable(resume: Resume) -> Iterator[None]:
    """After Ctrl-C or SIGTERM, a training saves its state before it stops; any other stage stops immediately."""
    def stop(number: int, frame: Any) -> None:
        if not resume.stop():
            raise KeyboardInterrupt

    before = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)

