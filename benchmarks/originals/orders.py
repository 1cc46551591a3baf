"""SLEB, ShortGPT, Shortened LLaMA and LLM-Drop: layers, or attentions and MLPs, are ordered and removed.

SLEB (jiwonsong-dev/SLEB): `sleb.sleb`. Shims: the loaders return our model and tokens; `get_loss` runs on the CPU; the
    attention returns three results, and a layer returns a tensor; `fire` is absent. Both sides remove REMOVED layers.
ShortGPT (sramshetty/ShortGPT, not by the authors of the paper, who released no code): `ShortLlama.eval_importance`.
    Shims: Meta's package `llama` is absent; a model with the names of that package runs the layers of transformers;
    GPU devices become the CPU. The order of all layers is compared. Both sides use the last state before the norm.
Shortened LLaMA (Nota-NetsPresso/shortened-llm): the scripts `anal_block_sensitivity_ppl.py` and `.._taylor.py`. Shims:
    `get_model` and `get_examples` return our model and tokens; `LLMPruner.peft` is absent. No layer is protected, as in
    the scripts, and the order of all layers is compared.
LLM-Drop (CASE-Lab-UMD/LLM-Drop): `discrete_layer_dropping` for attentions and MLPs in one list. Shims: the rotary
    tables; a stand-in with the functions of accelerate for one process. The first DROPPED parts are compared.
"""
import importlib
import json
import runpy
import sys
import tempfile
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn

from kdp_core.methods import METHODS, shortened, shortgpt, sleb
from originals import shims
from originals.cases import Case, Original, Pair, same_order, selection

REMOVED = 1
"""Layers that SLEB removes."""
DROPPED = 8
"""Parts that LLM-Drop removes."""
BATCH = 8
"""Sequences in a forward pass of ShortGPT, on both sides."""


def by_loss(case: Case) -> Pair:
    """The pair of SLEB."""
    case = case.some(2)
    script, = shims.imported(case.clone, "sleb", absent={"fire": {}})
    replace, loss = script.block_replace, script.get_loss

    def with_switches(model: nn.Module) -> nn.Module:
        model = replace(model)
        shims.three_results(model.model.layers)
        for layer in model.model.layers:
            layer.register_forward_hook(lambda module, args, output: output[0])
        return model

    def original() -> list[int]:
        model = case.model()
        model.name, model.seqlen = "llama", case.length
        text = SimpleNamespace(input_ids=case.tokens.ids_ST.reshape(1, -1))
        changed = {"get_llm": lambda name: model, "get_trainloaders": lambda *_, **__: text,
                   "block_replace": with_switches, "get_loss": lambda one, ids, bs, device: loss(one, ids, bs, "cpu")}
        with shims.quiet(), mock.patch.multiple(script, **changed), tempfile.TemporaryDirectory() as out:
            script.sleb("llama", case.facts.layers, REMOVED, result_folder=out, eval_ppl=False)
            lines = Path(out, "sleb_results.txt").read_text(encoding="utf-8").splitlines()
        return json.loads(next(line for line in lines if "Removal Order" in line).split(":")[1])

    def ours() -> list[int]:
        return sleb.greedy(case.dense, None, case.tokens, case.facts, k_max=1, sequences=None,
                           largest=REMOVED / case.facts.layers).order

    return Pair(case, f"{REMOVED} layers removed, {case.work}", ours, original, same_order)


def by_influence(case: Case) -> Pair:
    """The pair of ShortGPT."""
    case = case.some(8)
    script, = shims.imported(case.clone / "short_gpt", "short_llama",
                             absent={"llama": {"Llama": object, "Transformer": nn.Module}})

    def original() -> list[int]:
        given = SimpleNamespace(model=_as_metas(case.model(), case.length), tokenizer=SimpleNamespace(pad_id=-1))
        short = script.ShortLlama(given)
        with shims.on_cpu():
            for ids_BT in case.batches(BATCH):
                short.eval_importance(ids_BT.tolist())
        return sorted(range(case.facts.layers), key=lambda layer: (short.importances[layer], layer))

    def ours() -> list[int]:
        return shortgpt.block_influence(case.dense, case.states(), case.tokens, case.facts, k_max=1).order

    return Pair(case, f"all layers, {case.work}", ours, original, same_order)


class _Layer(nn.Module):
    """A decoder layer with the arguments of Meta's code."""

    def __init__(self, layer: nn.Module, tables: tuple[Tensor, Tensor]) -> None:
        super().__init__()
        self.layer, self.tables = layer, tables

    def forward(self, h_BTD: Tensor, start: int, rotations: Tensor, mask: Tensor) -> Tensor:
        return self.layer(h_BTD, position_embeddings=self.tables)


def _as_metas(model: nn.Module, length: int) -> nn.Module:
    """The model with the names of Meta's code."""
    made, tables = nn.Module(), shims.rotary(model, length)
    made.tok_embeddings, made.norm, made.output = model.model.embed_tokens, model.model.norm, model.lm_head
    made.layers = nn.ModuleList(_Layer(layer, tables) for layer in model.model.layers)
    made.freqs_cis = torch.zeros(length, 1)
    made.params = SimpleNamespace(max_batch_size=BATCH, max_seq_len=length)
    return made


def _sensitivity(case: Case, script: str) -> list[int]:
    """Run a script of Shortened LLaMA. Returns the order in which it removes layers."""
    source = case.clone / "src"
    with shims.importable(source, absent={"LLMPruner": {}, "LLMPruner.peft": {"PeftModel": object}}), \
            shims.quiet(), tempfile.TemporaryDirectory() as out:
        utils, dataset = map(importlib.import_module, ("utils", "dataset"))
        utils.get_model = lambda **_: (case.model(), None, "")
        dataset.get_examples = lambda **_: case.tokens.ids_ST
        words = [script, "--device", "cpu", "--num_calib_data", str(case.count), "--output_dir", out]
        with mock.patch.object(sys, "argv", words):
            runpy.run_path(str(source / script), run_name="__main__")
        return [int(word) for word in Path(out, "block_order.csv").read_text(encoding="utf-8").split(",")]


def by_perplexity(case: Case) -> Pair:
    """The pair of Shortened LLaMA's perplexity."""
    return _shortened(case.some(2), "anal_block_sensitivity_ppl.py", shortened.perplexity)


def by_taylor(case: Case) -> Pair:
    """The pair of Shortened LLaMA's Taylor score."""
    return _shortened(case.some(10), "anal_block_sensitivity_taylor.py", shortened.taylor)


def _shortened(case: Case, script: str, search: Any) -> Pair:
    def ours() -> list[int]:
        return search(case.dense, None, case.tokens, case.facts, k_max=1, keep_first=0, keep_last=0, sequences=None,
                      batch_sequences=case.count).order

    return Pair(case, f"all layers, {case.work}", ours, partial(_sensitivity, case, script), same_order)


def by_parts(case: Case) -> Pair:
    """The pair of LLM-Drop."""
    case = case.some(8)
    folder, layers = case.clone / "src/llmtuner/compression", case.facts.layers
    module, = shims.imported(folder, "prune.layer_drop", bare=("prune",))
    alone = SimpleNamespace(device=torch.device("cpu"), unwrap_model=lambda model: model, print=lambda *_: None,
                            reduce=lambda value, reduction: value, is_main_process=True, is_local_main_process=True,
                            wait_for_everyone=lambda: None)

    def original() -> list[tuple[int, str]]:
        model = shims.with_positions(case.model(), case.length)
        rows = [{"input_ids": ids_BT} for ids_BT in case.batches(1)]
        with shims.quiet(), tempfile.TemporaryDirectory() as out:
            options = SimpleNamespace(drop_n=DROPPED, target_layer="all", layer_drop_norm=True,
                                      similarity_cache_file=f"{out}/all.pt")
            places = module.discrete_layer_dropping(options, model, rows, alone, case.count)
        return [(place % layers, "attention" if place < layers else "mlp") for place in places]

    def ours() -> list[tuple[int, str]]:
        found = METHODS["joint_drop"].compose(case.dense, case.states([layers]), case.tokens, selection(ratio=0.25))
        return [(part["layer"], part["part"]) for part in found.stats["order"][:DROPPED]]

    return Pair(case, f"attentions and MLPs, {case.work}", ours, original,
                lambda mine, theirs: same_order(mine, theirs[:len(mine)]))


ORIGINALS = {
    "sleb": Original("jiwonsong-dev/SLEB", "d07129af60520e751087b8abb04a268a3c7ec861", by_loss),
    "shortgpt": Original("sramshetty/ShortGPT", "78d9615fdcae6d90368832bd0a86c49c323549b9", by_influence),
    "shortened_ppl": Original("Nota-NetsPresso/shortened-llm", "4031a9212aa0dbeec8f2ad504af9346c758b0147",
                              by_perplexity),
    "shortened_taylor": Original("Nota-NetsPresso/shortened-llm", "4031a9212aa0dbeec8f2ad504af9346c758b0147",
                                 by_taylor),
    "joint_drop": Original("CASE-Lab-UMD/LLM-Drop", "28b5dd14c2474c7110b2b42f5862a6dbdbe71a2d", by_parts),
}
