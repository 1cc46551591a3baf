"""The commands of kdp. After an error, a command prints one line on stderr and ends with exit code 1; `kdp --trace`
also prints the stack trace.

Heavy modules are imported in the commands that need them, so that `kdp --help` is quick.
"""
import logging
import os
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from kdp import show, sources

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
os.environ.setdefault("TQDM_DISABLE", "1")

CACHE = Path("~/.cache/kdp")
METHOD = "kdp_residual"
"""The method that prunes if the user names no method; `kdp_core.prune_model` has the same default."""
LARGEST_SEED = 2**63 - 1
"""The largest seed of a generator of torch."""
INTERRUPTED = 130
"""The exit code after Ctrl-C."""


class CommandError(ValueError):
    """A command cannot be run with the given arguments."""


class OneLine(typer.core.TyperGroup):
    """A group of commands that prints every error as one line."""

    def main(self, args: Sequence[str] | None = None, prog_name: str | None = None, complete_var: str | None = None,
             standalone_mode: bool = True, windows_expand_args: bool = True, **extra: Any) -> Any:
        """Run a command. In stand-alone mode, the exit code is 0, 1 after an error, and 130 after Ctrl-C."""
        if not standalone_mode:
            return super().main(args, prog_name, complete_var, False, windows_expand_args, **extra)
        try:
            code = super().main(args, prog_name, complete_var, False, windows_expand_args, **extra)
        except (KeyboardInterrupt, typer.Abort):
            code = INTERRUPTED
        except Exception as error:
            if _STATE["trace"]:
                raise
            print(f"kdp: {sentence(error)}", file=sys.stderr)
            code = 1
        if code == INTERRUPTED:
            print("kdp: interrupted; run the same command again to continue", file=sys.stderr)
        sys.exit(code or 0)


def sentence(error: Exception) -> str:
    """The message of an error in one line; for an error without a message, its type."""
    if isinstance(error, OSError) and error.filename and error.strerror:
        return f"{error.filename}: {error.strerror}; name another path, or change its permissions"
    said = _of_arguments(error) if hasattr(error, "format_message") else str(error)
    # errors of the library have a message for the user; for any other error, the type is printed too
    mine = isinstance(error, ValueError | RuntimeError) or hasattr(error, "format_message")
    return " ".join(said.split()) if said and mine else f"{type(error).__name__}: {' '.join(said.split())}"


def _of_arguments(error: Any) -> str:
    """What is wrong with the arguments of a command: the value of an option and what it must be, or what is missing."""
    if hasattr(refused := error.__cause__, "errors") and (found := refused.errors()):
        option = max(error.param.opts, key=len)
        return f"{option} is {found[0]['input']!r}, but must be {found[0]['msg'].removeprefix('Input should be ')}"
    said = error.format_message().removesuffix(".")
    context = getattr(error, "ctx", None)
    return f"{said}; see `{' '.join(['kdp', *context.command_path.split()[1:]])} --help`" if context else said


_STATE = {"trace": False}
app = typer.Typer(cls=OneLine, no_args_is_help=True, pretty_exceptions_enable=False, rich_markup_mode="rich",
                  help="Prune a language model, try it, and see what was done to it.")
Folder = Annotated[Path, typer.Argument(help="Folder of a checkpoint, pruned or dense.", show_default=False)]
Device = Annotated[str, typer.Option(help="cpu, cuda, cuda:N or auto.")]
Cache = Annotated[Path, typer.Option(help="Folder for fetched files.")]
Heldout = Annotated[str, typer.Option(help="Held-out text: a source, a file, or `default`.")]


@app.callback()
def start(trace: Annotated[bool, typer.Option("--trace", help="Show the whole trace of an error.")] = False) -> None:
    """Set the options that all commands share."""
    _STATE["trace"] = trace
    logging.basicConfig(level=logging.ERROR, format="%(message)s")


def console() -> Console:
    """The terminal. Each call makes a new console, because stdout may have changed since the last call."""
    return Console(soft_wrap=False)


def quiet() -> None:
    """Silence the progress bars and hints of the packages that load models."""
    import transformers

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()


def ready() -> None:
    """Prepare a command that runs models: no progress bars, and the library of matrix products that jobs use."""
    from kdp_core.base import products

    quiet()
    products.choose()


def check_checkpoint(folder: Path, *, whole: bool = True) -> None:
    """Raise an error for a folder without a checkpoint, or with a checkpoint that is not whole.

    whole: tokenizer and weights are read too.
    """
    from kdp_core.model import intake

    if not (folder / "config.json").is_file():
        unfinished = (folder / ".kdp").is_dir()
        raise CommandError(f"{folder} contains no checkpoint (no config.json); " + (
            "its pruning is not finished: run the same `kdp prune` again" if unfinished else
            "name the folder that `kdp prune` wrote"))
    intake.read_config(folder)
    if whole:
        intake.check_tokenizer_files(folder)
        intake.check_weight_files(folder)


def parsed_options(given: list[str]) -> dict[str, dict[str, Any]]:
    """Parse texts of the form `part.option=value` into {part: {option: value}}; the values are parsed as YAML."""
    import yaml

    found: dict[str, dict[str, Any]] = {}
    for one in given:
        name, equals, value = one.partition("=")
        part, dot, option = name.partition(".")
        if not (equals and dot and part and option):
            raise CommandError(f"--option is {one!r}; write part.option=value, such as compose.epochs=2")
        try:
            found.setdefault(part, {})[option] = yaml.safe_load(value)
        except yaml.YAMLError:
            raise CommandError(f"--option {name} is {value!r}, which is not valid YAML; write a number, a "
                               "word or a list") from None
    return found


@app.command()
def prune(model: Annotated[str, typer.Argument(help="A source such as hf:org/name@revision, a folder, a .gguf file, or "
                                                    "`default`.", show_default=False)],
          out: Annotated[Path, typer.Option(help="Folder of the pruned checkpoint.", show_default=False)],
          ratio: Annotated[float, typer.Option(help="Share of all parameters to remove.")] = 0.25,
          calibration: Annotated[str, typer.Option(
              help="Calibration text: a source such as hf-data:org/name@revision, a file (.jsonl has a field `text`), "
                   "or `default`.")] = sources.DEFAULT,
          heldout: Heldout = sources.DEFAULT,
          method: Annotated[str, typer.Option(help="Name of a method; `kdp methods` lists them.")] = METHOD,
          option: Annotated[list[str], typer.Option(help="An option of the method: part.option=value; may be given "
                                                         "several times.")] = [],  # noqa: B006  typer copies it
          thorough: Annotated[bool, typer.Option("--thorough", help="Use the method's own defaults, which may need an "
                                                                    "hour, in place of its quick setting.")] = False,
          k_max: Annotated[int, typer.Option(help="Layers of a block's context.")] = 3,
          sequences: Annotated[int, typer.Option(help="Calibration sequences.")] = 128,
          length: Annotated[int, typer.Option(help="Tokens of a sequence, and of a held-out window.")] = 128,
          seed: Annotated[int, typer.Option(help="Seed of the choice of sequences.", min=0, max=LARGEST_SEED)] = 0,
          dtype: Annotated[str, typer.Option(help="float32, bfloat16 or float16.")] = "float32",
          device: Device = "cpu",
          keep: Annotated[bool, typer.Option("--keep", help="Keep the dense checkpoint and the hidden states, in "
                                                            "DIR/.kdp.")] = False,
          cache: Cache = CACHE) -> None:
    """Remove a share of a model's parameters. Print what was removed, how much quality is lost, and the speed-up.

    An interrupted run continues when the same command is given again.
    """
    from kdp import pruning

    ready()
    settings = pruning.Settings(model, calibration, heldout, method, ratio, k_max, sequences, length, seed, dtype,
                                pruning.options_of(method, parsed_options(option), thorough=thorough))
    terminal = console()
    with show.stages(terminal) as shown:
        found = pruning.prune(settings, out, cache=cache.expanduser(), device=device, keep=keep, show=shown)
    terminal.print(show.sentences(found, out), markup=False, highlight=False)
    terminal.print(show.summary(found))


@app.command()
def generate(folder: Folder, prompt: Annotated[str, typer.Argument(help="What the model continues.",
                                                                   show_default=False)],
             tokens: Annotated[int, typer.Option(help="Largest number of new tokens.", min=1)] = 64,
             chat: Annotated[bool, typer.Option("--chat", help="Insert the prompt into the chat template.")] = False,
             temperature: Annotated[float, typer.Option(help="0 selects the most likely token.", min=0)] = 0.0,
             seed: Annotated[int, typer.Option(help="Seed of the sampling, with a temperature above 0.", min=0,
                                               max=LARGEST_SEED)] = 0,
             device: Device = "cpu") -> None:
    """Continue a prompt with a checkpoint."""
    check_checkpoint(folder)
    if not prompt.strip():
        raise CommandError("the prompt is empty; give at least one word")
    import torch

    from kdp_core.base import texts
    from kdp_core.model import checkpoints
    from kdp_core.model.families import first_token

    ready()
    reader = checkpoints.load_tokenizer(folder)
    if chat and not reader.chat_template:
        raise CommandError(f"{folder} has no chat template; do not use --chat")
    text = reader.apply_chat_template([{"role": "user", "content": prompt}], tokenize=False,
                                      add_generation_prompt=True) if chat else prompt
    model = checkpoints.load_model(folder, device=device)
    ids = texts.prompt_ids(reader, text, templated=chat, start=first_token(model))
    torch.manual_seed(seed)
    draws = {"do_sample": True, "temperature": temperature} if temperature else {"do_sample": False}
    with torch.inference_mode():
        made = model.generate(ids.to(model.device), attention_mask=torch.ones_like(ids, device=model.device),
                              max_new_tokens=tokens, pad_token_id=reader.eos_token_id, **draws)
    typer.echo(reader.decode(made[0, ids.shape[1]:], skip_special_tokens=True))


@app.command()
def compare(first: Folder, second: Folder, heldout: Heldout = sources.DEFAULT,
            window: Annotated[int, typer.Option(help="Tokens of a window.", min=2)] = 128,
            device: Device = "cpu", cache: Cache = CACHE) -> None:
    """Compare the perplexities of two checkpoints on the same held-out windows, with the paired difference."""
    for folder in (first, second):
        check_checkpoint(folder)
    wanted = sources.text(heldout, "--heldout", sources.HELDOUT)
    from kdp import heldout as scoring

    ready()
    scoring.check_same_tokens(first, second)
    ids_ST = scoring.windows(first, sources.documents(wanted, cache.expanduser()), window)
    scored = [scoring.perplexity(folder, ids_ST, device=device) for folder in (first, second)]
    table = show.plain_table("checkpoint", "perplexity", "standard error")
    for folder, one in zip((first, second), scored, strict=True):
        table.add_row(str(folder), f"{one.ppl:.3f}", "" if one.stderr is None else f"{one.stderr:.3f}")
    found = scoring.difference(*scored)
    console().print(table)
    typer.echo(f"The second has {found.ratio:.4f} times the perplexity of the first: {found.nats_per_token:+.4f} nats "
               f"per token, standard error {found.stderr:.4f} over {found.windows} windows, p = {found.p:.2g} "
               "(paired t).")


@app.command()
def inspect(folder: Folder) -> None:
    """Show how a checkpoint was pruned: method, parameters before and after, provenance, a picture of its layers."""
    check_checkpoint(folder, whole=False)
    from kdp import record

    quiet()
    terminal = console()
    terminal.print(record.facts(folder))
    terminal.print(show.layers(record.shape(folder), record.pruned(folder)))


@app.command()
def export(folder: Folder, gguf: Annotated[Path, typer.Option(help="The GGUF file to write.", show_default=False)]
           ) -> None:
    """Write a GGUF file for llama.cpp, from a checkpoint whose layers are only removed or merged."""
    check_checkpoint(folder)
    if gguf.exists():
        raise CommandError(f"--gguf is {gguf}, which already exists; name another file, or delete it")
    from kdp_core.model import gguf_export

    quiet()
    try:
        gguf_export.export(folder, gguf)
    except OSError as error:
        raise CommandError(f"--gguf is {gguf}, which cannot be written ({error.strerror or error}); name another "
                           "place") from error
    typer.echo(f"{gguf} is written, {gguf.stat().st_size / 1e6:.0f} MB.")


@app.command()
def expect(folder: Folder,
           dense: Annotated[str | None, typer.Option(
               help="The dense model: a folder or a source. If not given, the model that FOLDER's record names.",
               show_default=False)] = None,
           heldout: Heldout = sources.DEFAULT,
           windows: Annotated[int, typer.Option(help="Windows of held-out text.", min=2)] = 8,
           window: Annotated[int | None, typer.Option(
               help="Tokens of a window. If not given, the length on which the predictor was fitted.", min=2,
               show_default=False)] = None,
           device: Device = "cpu", cache: Cache = CACHE) -> None:
    """Predict whether a pruned checkpoint still generates good text. The command itself generates nothing."""
    check_checkpoint(folder)
    wanted = sources.text(heldout, "--heldout", sources.HELDOUT)
    from kdp import expectation

    quiet()
    with expectation.dense_of(folder, dense, cache.expanduser()) as other:
        found = expectation.expectation(folder, other, sources.documents(wanted, cache.expanduser()), windows=windows,
                                        length=window, device=device)
    typer.echo(found.sentence)
    console().print(expectation.table(found))


@app.command()
def plan(config: Annotated[Path, typer.Argument(help="A configuration; `kdp init` writes one.",
                                                show_default=False)]) -> None:
    """Check a configuration of the workflow and estimate its jobs, hours and disk; nothing is run."""
    from kdp import workflow

    quiet()
    table, missing = workflow.plan(config)
    typer.echo(table)
    for line in missing:
        typer.echo(f"note: {line}", err=True)


@app.command("methods")
def list_methods() -> None:
    """List the methods, with their change to the model and their paper."""
    from kdp_core.methods import METHODS

    table = show.plain_table("method", "what is done", "paper")
    for column in table.columns[1:]:
        column.justify = "left"
    for name, method in METHODS.items():
        table.add_row(name, method.group, method.paper)
    console().print(table)


@app.command()
def init(file: Annotated[Path, typer.Argument(help="The file to write.")] = Path("mine.yaml"),
         model: Annotated[str, typer.Option(help="A source, a folder, a .gguf file, or `default`.")] = sources.DEFAULT,
         calibration: Annotated[str, typer.Option(help="Calibration text: a source, a file, or "
                                                       "`default`.")] = sources.DEFAULT,
         heldout: Heldout = sources.DEFAULT) -> None:
    """Write a commented configuration of the workflow for your own model and texts."""
    from kdp import starter

    starter.write(file, model, calibration, heldout)
    typer.echo(f"{file} is written. `kdp plan {shlex.quote(str(file))}` checks it and estimates its cost.")
