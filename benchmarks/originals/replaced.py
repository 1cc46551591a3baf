"""LaCo, ReplaceMe and LLM-Streamline: layers are merged, or replaced by a matrix or by a trained layer.

LaCo (yangyifei729/LaCo): the cells of the notebook for LLaMA-13B, except the cells that load the model. One walk with a
    given threshold; our walk merges as the released code does. Shims: the notebook's tokenizer returns our sequences.
ReplaceMe (mts-ai/ReplaceMe): `lstsq.lstsq` for a given block. Shims: the tokenizer, the loader and the choice of the
    block return ours, and both calls of `from_pretrained` the loaded model; GPU devices become the CPU; the checkpoint
    is not written; `torchmin` and `termcolor` are absent.
    Our fit also reads one held-out sequence. The new matrix of the MLP before the block is compared.
LLM-Streamline (RUCKBReasoning/LLM-Streamline): `lightweight_model_train` for a given block. Shims: the data and the
    choice of the layer are ours; the trained layer gets its rotary tables. The learning rates and the order of the
    sequences differ, so the results are not compared.
"""
import copy
import json
import tempfile
from functools import partial
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
from stage.timing import Row, figure
from torch import Tensor, nn
from transformers import PreTrainedModel

from kdp_core.methods import METHODS, replaceme
from kdp_core.methods.merging import _merge, laco
from kdp_core.model import checkpoints
from kdp_core.model.families import decoder_layers
from kdp_core.model.passes import Passes
from kdp_core.states.block import split
from originals import shims
from originals.cases import Case, Original, Pair, Tensors, difference, selection

GROUP, STRIDE, THRESHOLD = 4, 2, 0.9
"""LaCo's C and I for models of 7B, and a threshold at which SmolLM2-135M loses some layers."""
BLOCK = 4
"""Layers that are replaced."""
BATCH = 8
EPOCHS = 2


def merged(case: Case) -> Pair:
    """The pair of LaCo."""
    # the notebook has five sentences of about 20 tokens
    case = case.some(5, length=32)
    cells = ["".join(cell["source"]) for cell in
             json.loads((case.clone / "laco_llama-13b.ipynb").read_text(encoding="utf-8"))["cells"]]
    count = case.facts.layers

    def original() -> list[Tensors]:
        names: dict[str, Any] = {"llama_13B": case.model(), "tokenizer": _Sentences(case)}
        with shims.quiet():
            for cell in cells:
                if "from_pretrained" not in cell:
                    exec(compile(cell, "LaCo", "exec"), names)
                if "THRESHOLD" in cell and "MERGE_LAYERS =" in cell:
                    names |= {"INTERVAL": STRIDE, "MERGE_LAYERS": GROUP, "HIGHEST_LAY": count - 1, "LOWEST_LAY": 0,
                              "THRESHOLD": THRESHOLD}
        return [layer.state_dict() for layer in names["llama_13B_copy_to_compress"].model.layers]

    def ours() -> tuple[_merge.Stack, dict[int, Tensors]]:
        states = case.states()
        judge = _merge.Judge(Passes(case.model(), case.length), states, torch.arange(case.count), BATCH)
        walker = partial(laco._laco, merge="as_released", group=GROUP, stride=STRIDE, lowest=0, highest=None)
        stack = _merge.walked(walker, judge.cosine, count, THRESHOLD, count).stack
        return stack, {place: judge.maps(layer) for place, layer in enumerate(stack)
                       if layer != _merge.plain(layer.base)}

    return Pair(case, f"groups of {GROUP}, {case.work}", ours, original, _compare_merges)


class _Sentences:
    """Stands in for the tokenizer: returns the next of our sequences for any text."""

    def __init__(self, case: Case) -> None:
        self.ids_ST, self.calls = case.tokens.ids_ST, 0

    def __call__(self, text: str, **_: Any) -> dict[str, Tensor]:
        self.calls += 1
        return {"input_ids": self.ids_ST[[(self.calls - 1) % len(self.ids_ST)]]}


def _compare_merges(ours: tuple[_merge.Stack, dict[int, Tensors]], theirs: list[Tensors]) -> list[Row]:
    stack, maps = ours
    rows = [figure("layers left on both sides", len(stack), "", "of", len(theirs), target=1.0)]
    if len(stack) == len(theirs):
        rows.append(difference(_flat(maps), _flat(dict(enumerate(theirs))), 1e-5, "merged weights"))
    return rows


def _flat(layers: dict[int, Tensors]) -> Tensors:
    """The weights of all layers in one dictionary."""
    return {f"{place}.{name}": weight for place, own in layers.items() for name, weight in own.items()}


def by_least_squares(case: Case) -> Pair:
    """The pair of ReplaceMe."""
    case = case.some(8)
    # the module sets the seeds of all generators and the format of the log
    with mock.patch("logging.basicConfig"), torch.random.fork_rng(devices=[]), shims.quiet():
        module, = shims.imported(case.clone, "ReplaceMe.lstsq", absent={"torchmin": {"minimize": None},
                                                                        "termcolor": {"colored": None}})
    start, stop = block = case.block(BLOCK)
    heldout = 0.5 / case.count
    _, kept = split(case.count, heldout, 0)

    def original() -> Tensors:
        saved: list[PreTrainedModel] = []
        changed = {"get_calib_dataloader": lambda *_: case.tokens.ids_ST[kept].split(BATCH),
                   "AutoTokenizer": SimpleNamespace(from_pretrained=lambda _: _Ids()),
                   "AutoModelForCausalLM": SimpleNamespace(from_pretrained=lambda *_, **__: case.model()),
                   "select_non_overlapping_blocks": lambda *_, **__: [block]}
        case.model().config.output_hidden_states = True
        weights = decoder_layers(case.model())[start - 1].mlp.down_proj
        with tempfile.TemporaryDirectory() as out, mock.patch.multiple(module, **changed), \
                mock.patch.object(PreTrainedModel, "save_pretrained", lambda model, path: saved.append(model)), \
                shims.quiet(), shims.on_cpu():
            torch.save([], f"{out}/distances.pth")
            module.lstsq(str(case.dense), "", "", BATCH, case.length, BLOCK, save_path=f"{out}/saved",
                         distances_path=f"{out}/distances.pth")
        return {"new": weights.weight.detach()}

    def ours() -> Tensors:
        return replaceme.compose(case.dense, case.states([start - 1, stop]), case.tokens, selection([block]),
                                 heldout=heldout).plan.tensors

    def compare(mine: Tensors, theirs: Tensors) -> list[Row]:
        # the original rounds the matrix to bfloat16
        return [difference({"new": next(iter(mine.values()))}, theirs, 0.01, "the new matrix")]

    return Pair(case, f"layers {start} to {stop - 1}, {case.work}", ours, original, compare)


class _Ids:
    """Stands in for the tokenizer: the batches are token ids already."""
    pad_token = "given"

    def __call__(self, ids_BT: Tensor, **_: Any) -> dict[str, Tensor]:
        return {"input_ids": ids_BT, "attention_mask": torch.ones_like(ids_BT)}

    def save_pretrained(self, path: str) -> None:
        """Nothing is written."""


def by_layer(case: Case) -> Pair:
    """The pair of LLM-Streamline."""
    case = case.some(16)
    module, = shims.imported(case.clone, "LLM_Streamline.train_lightweightnetwork")
    kind = module.LlamaDecoderLayer
    start, stop = block = case.block(BLOCK)
    heldout = 1 / 8
    held, kept = split(case.count, heldout, 0)

    def original() -> None:
        model, tokenizer = case.model(), checkpoints.load_tokenizer(case.dense)
        tokenizer.pad_token = tokenizer.eos_token
        rows = [{"input_ids": ids_T.tolist()} for ids_T in case.tokens.ids_ST]
        changed = {"load_dataset": lambda _: {"train": None}, "get_cosine_similarity": lambda *_: start,
                   "process_datasets": lambda *_: tuple([rows[one] for one in which] for which in (kept, held)),
                   "LlamaDecoderLayer": partial(_with_tables, kind, shims.rotary(model, case.length))}
        with shims.quiet(), mock.patch.multiple(module, **changed):
            module.lightweight_model_train(model, tokenizer, "cpu", stop - start, case.facts.layers, 0, 0, BATCH,
                                           EPOCHS, 2e-4, 5e-5, 1e-3, copy.deepcopy(model.config), "llama", 1)

    def ours() -> None:
        METHODS["streamline"].compose(case.dense, case.states([start, stop]), case.tokens, selection([block]),
                                      epochs=EPOCHS, batch_sequences=BATCH, heldout=heldout)

    return Pair(case, f"{EPOCHS} epochs for layers {start} to {stop - 1}, {case.work}", ours, original, lambda *_: [])


def _with_tables(kind: type[nn.Module], tables: tuple[Tensor, Tensor], *given: Any) -> nn.Module:
    """A new decoder layer that gets these rotary tables whenever it is called."""
    layer = kind(*given)
    shims.pass_tables(layer, tables)
    return layer


ORIGINALS = {
    "laco": Original("yangyifei729/LaCo", "84835877f918dc972df1a1375e09209551e02f3d", merged),
    "replaceme_lstsq": Original("mts-ai/ReplaceMe", "5bb71d99da40c8b0ba0df488589e14d77ced7fee", by_least_squares),
    "streamline": Original("RUCKBReasoning/LLM-Streamline", "adf50baa83a1fabb644a2bd165fb9636838ff00b", by_layer),
}
