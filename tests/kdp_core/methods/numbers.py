"""What every method gives on every family, as numbers: `python -m tests.kdp_core.methods.numbers` records what is new.

The battery compares with numbers.json. A method or a family that is added has no numbers there. The command adds them,
removes those of methods that are gone, and leaves the others as they are. `--again METHOD` computes those of one method
again, after a change that means to change them.
"""
import argparse
import json
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

import torch

from kdp_core import methods
from kdp_core.base.records import ModelFacts, Plan, PrunedFacts, Similarity, Tokens
from kdp_core.methods import METHODS
from kdp_core.model import checkpoints
from kdp_core.model.families import family_of
from kdp_core.prune.fold import fold
from kdp_core.states import hidden
from kdp_core.states.hidden import HiddenStates
from kdp_core.states.similarity import similarity
from tests import pico
from tests.kdp_core import stored

RATIO, K_MAX = 0.25, 3
IDS_ST = torch.arange(2, 26).view(2, 12)
PATH = Path(__file__).with_name("numbers.json")


class Dense(NamedTuple):
    """What every method starts from."""
    folder: Path
    hidden: HiddenStates
    tokens: Tokens
    similarity: Similarity
    facts: ModelFacts


def prepared(family: str, root: Path) -> Dense:
    """A pico checkpoint of a family with its states, below `root`."""
    folder = pico.save(root / "dense", family)
    model = checkpoints.load_model(folder)
    hidden.extract(model, stored.tokens(), root / "hidden.zarr")
    states = hidden.read(root / "hidden.zarr")
    return Dense(folder, states, stored.tokens(), similarity(states, tokens=256, batch=64),
                 checkpoints.facts(model, source="pico", sha256=""))


def run(name: str, dense: Dense, keep: methods.Keep = methods.made) -> Plan:
    """The plan of a method with the options of its example; `keep` gets its records, as in `methods.run`."""
    return methods.run(name, dense.folder, dense.hidden, dense.tokens, dense.similarity, dense.facts, ratio=RATIO,
                       k_max=K_MAX, options=METHODS[name].example, keep=keep)


def logits(model: Any) -> torch.Tensor:
    """Of two short made-up texts."""
    with torch.no_grad():
        return model(IDS_ST).logits


def numbers_of(plan: Plan, facts: PrunedFacts, model: Any) -> dict[str, Any]:
    """What the plan removes, the number of parameters that stay, and the sum of the logits of the pruned model and the
    sum of their absolute values."""
    found = logits(model).double()
    return {"drop": [f"{layer}:{part}" for layer, part in plan.drop], "params_after": facts.params_after,
            "params_removed": facts.params_removed, "logits_sum": found.sum().item(),
            "logits_size": found.abs().sum().item()}


def expected() -> set[tuple[str, str]]:
    """(family, method) of all that is not refused."""
    return {(family, name) for family in pico.EVERY for name, method in METHODS.items()
            if not method.refuses(family_of(family))}


def recorded() -> dict[str, dict[str, dict[str, Any]]]:
    """Family -> method -> what it gave when it was recorded."""
    return json.loads(PATH.read_text(encoding="utf-8"))


def _record(again: str | None) -> None:
    known = recorded()
    for family in pico.EVERY:
        mine = known[family] = {name: one for name, one in known.get(family, {}).items()
                                if (family, name) in expected()}
        wanted = [name for name in METHODS
                  if (family, name) in expected() and (name not in mine or name == again)]
        with tempfile.TemporaryDirectory() as root:
            dense = prepared(family, Path(root)) if wanted else None
            for name in wanted:
                plan, folder = run(name, dense), Path(root) / name
                mine[name] = numbers_of(plan, fold(plan, dense.folder, folder), checkpoints.load_model(folder))
        print(f"{family}: {len(wanted)} recorded, {len(mine)} in all", flush=True)
        _write({family: known[family] for family in pico.EVERY if family in known})


def _write(known: dict[str, dict[str, Any]]) -> None:
    families = ["\n".join([f'"{family}": {{',
                           ",\n".join(f'  "{name}": {json.dumps(one)}' for name, one in mine.items()), "}"])
                for family, mine in known.items()]
    PATH.write_text("{\n" + ",\n".join(families) + "\n}\n", encoding="utf-8")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--again", metavar="METHOD", choices=METHODS, help="compute the numbers of this method anew")
    _record(parser.parse_args().again)
