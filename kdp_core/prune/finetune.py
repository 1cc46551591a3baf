"""Fine-tuned variants of pruned checkpoints: low-rank changes are trained to match the dense model's outputs.

KDP (Ma et al., ICLR 2026, appendix B) fine-tunes the output head; the paper's tables mark these variants with a dagger.
LLM-Pruner and SliceGPT fine-tune the linear layers. `targets` chooses between the two (`lora`), and the rest is the
same: the loss, the training (`tuning`), the tokens and the choice of the epoch. All other weights are frozen. Measured
by the held-out number that chooses the epoch, a fine-tuned variant is never worse than the pruned model.

The paper states neither the batch size nor the held-out share. The paper also does not state the unit of warm-up; in
this module the unit is one update. The paper uses validation perplexity to stop the training (`judge: ppl`). By
default, the held-out value of the training loss selects the epoch.
"""
import json
import logging
import shutil
import time
from functools import partial
from pathlib import Path
from typing import Annotated, Literal

import torch
from annotated_types import Ge, Lt
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoConfig, PreTrainedModel

from kdp_core.base import provenance, store
from kdp_core.base.options import Chance, Count, Natural, Positive, check
from kdp_core.base.records import Finetuned, PrunedFacts, Tokens
from kdp_core.base.resume import OFF, Resume
from kdp_core.model import checkpoints, folded, shards
from kdp_core.model.distil import Head, final_states, head_of
from kdp_core.model.families import family_of, type_of
from kdp_core.model.sizes import count_params
from kdp_core.model.surgery import head_is_tied
from kdp_core.prune import lora
from kdp_core.prune.lora import Lesson
from kdp_core.prune.tuning import FinetuneError, Options, train
from kdp_core.states.block import split

logger = logging.getLogger(__name__)
Targets = Literal["head", "linear"]
"""What fine-tuning changes."""
PartialShare = Annotated[float, Ge(0), Lt(1)]
"""A share from 0 to below 1."""


def finetune(dense: Path, pruned: Path, out: Path, tokens: Tokens, facts: PrunedFacts, device: str = "cpu",
             dtype: str = "float32", resume: Resume = OFF, *, targets: Targets = "head", rank: Count = 8,
             alpha: Positive = 32.0, dropout: PartialShare = 0.05, lr: Positive = 1e-4, epochs: Count = 2,
             kl_weight: Chance = 0.5, temperature: Positive = 1.0, batch_sequences: Count = 8,
             warmup: PartialShare = 0.03, clip: Positive = 1.0, heldout: PartialShare = 0.1,
             judge: Literal["loss", "ppl"] = "loss", seed: Natural = 0) -> tuple[PrunedFacts, Finetuned]:
    """Fine-tune the checkpoint in the folder `pruned`, write the new checkpoint to the folder `out` (atomic), and count
    its parameters.

    `facts` describes the checkpoint `pruned`. `dense` is the folder of the model from which `pruned` was made. `resume`
    is the file in which the state of the training is stored. The result is deterministic.
    targets: what is changed. `head` is the output head, as in the paper. `linear` is every linear layer of attentions,
        MLPs and stand-ins; each update then runs the whole pruned model, and the model gets no parameters.
    rank: rank r of each low-rank change.
    alpha: each change is scaled by alpha / rank.
    dropout: dropout of the inputs of the low-rank changes, only in training.
    lr: peak learning rate of Adam.
    epochs: passes over the sequences; the weights of the best epoch are used.
    kl_weight: lambda in the loss lambda KL(dense || pruned) + (1 - lambda) cross-entropy of the next token.
    temperature: temperature tau of the KL term.
    batch_sequences: number of sequences in one update.
    warmup: share of the updates in which the learning rate rises; afterwards the rate falls as a cosine to zero.
    clip: largest norm of the gradient.
    heldout: share of the sequences that are used only to judge epochs, not for training.
    judge: held-out number by which the best epoch is chosen: `loss` (the training loss) or `ppl` (the perplexity).
    seed: seed of the held-out choice, the order of the sequences, the start of A and the dropout.
    Raises FinetuneError, before any model is loaded, if the options, models and tokens do not fit together.
    """
    check(finetune, locals())
    began = time.monotonic()
    options = Options(targets, rank, alpha, dropout, lr, epochs, kl_weight, temperature, batch_sequences, warmup, clip,
                      heldout, judge, seed)
    check_sizes(*tokens.ids_ST.shape, checkpoints.config_of(dense).hidden_size, rank)
    check_zeros(facts.params_zeroed, targets)
    _check_models(dense, pruned, tokens.ids_ST)
    teacher_STD, teacher, _ = _frozen(dense, tokens.ids_ST, device, dtype)
    lesson = Lesson(tokens.ids_ST, teacher_STD, teacher)
    if targets == "head":
        h_STD, head, tied = _frozen(pruned, tokens.ids_ST, device, dtype)
        build, place = partial(lora.of_head, h_STD, head, tied, lesson, options), "adapter" if tied else "head"
    else:
        model = checkpoints.load_model(pruned, device=device, dtype=dtype).requires_grad_(False)
        _check_finite(final_states(model, tokens.ids_ST[:1]), pruned)
        build, place, tied = partial(lora.of_linear_layers, model, lesson, options), "linear", False
    held, kept = split(len(tokens.ids_ST), heldout, seed)
    # each forward pass has as many sequences as fit into one chunk of logits, so that nothing is computed twice
    part = max(1, teacher.chunk() // (tokens.ids_ST.shape[1] - 1))
    student, curve, epoch = train(build, kept, held, part, teacher.linear.weight.device, options, resume)
    new = _write(Path(pruned), Path(out), student.change() if epoch else {}, rank)
    facts_after = _count(new, facts, 2 * rank * teacher_STD.shape[-1] if epoch and tied else 0)
    return facts_after, Finetuned(
        place, rank, facts_after.params_added - facts.params_added, epoch, judge, curve, len(kept), len(held),
        len(kept) * (tokens.ids_ST.shape[1] - 1), options._asdict(), time.monotonic() - began + resume.earlier_s)


def _frozen(folder: Path, ids_ST: Tensor, device: str, dtype: str) -> tuple[Tensor, Head, bool]:
    """Final states of a checkpoint, its head, and whether the head is tied to the embedding. The memory of the rest of
    the model is freed."""
    model = checkpoints.load_model(folder, device=device, dtype=dtype).requires_grad_(False)
    h_STD = final_states(model, ids_ST)
    _check_finite(h_STD, folder)
    logger.info("final states of %d sequences, %s", len(ids_ST), type(model).__name__)
    return h_STD, head_of(model), head_is_tied(model)


# To a checkpoint ------------------------------------------------------------------------------------------------------

def _write(pruned: Path, out: Path, change: dict[str, Tensor], rank: int) -> PreTrainedModel:
    """Copy the checkpoint, write the tensors `change` into the copy, and load the copy once, in the same way as users
    do.

    If `change` is empty, the new checkpoint is an unchanged copy.
    """
    with store.atomic(out) as temporary:
        shutil.copytree(pruned, temporary, ignore=shutil.ignore_patterns(*provenance.ABOUT),
                        copy_function=shards.link_or_copy)
        if change:
            put(temporary, change)
        if "head_adapter.a.weight" in change:
            config = store.read_json(temporary / "config.json")
            names = folded.class_entries(family_of(config))
            store.write_json(temporary / "config.json", {**config, **names, "head_adapter": rank})
            (temporary / folded.FILE).write_text(folded.source(), encoding="utf-8")
        return checkpoints.load_model(temporary)


def put(folder: Path, change: dict[str, Tensor]) -> None:
    """Write tensors into a checkpoint, shard by shard. A new tensor is written into the first shard."""
    files = sorted(folder.glob("*.safetensors"))
    known: set[str] = set()
    for path in files:
        with safe_open(path, framework="pt") as file:
            known |= set(file.keys())
    for path in files:
        with safe_open(path, framework="pt") as file:
            names = set(file.keys())
            mine = {name for name in change if name in names or (path == files[0] and name not in known)}
            tensors = {name: file.get_tensor(name) for name in names} if mine else {}
        if mine:
            dtype = next(iter(tensors.values())).dtype
            tensors |= {name: change[name].to(dtype).contiguous() for name in mine}
            # other checkpoints may link to the same file
            path.unlink()
            save_file(dict(sorted(tensors.items())), path, metadata=shards.HEAD)
    if (folder / shards.INDEX).exists():
        index = json.loads((folder / shards.INDEX).read_text(encoding="utf-8"))
        index["weight_map"] |= {name: files[0].name for name in change if name not in known}
        store.write_json(folder / shards.INDEX, index)


def _count(model: PreTrainedModel, facts: PrunedFacts, added: int) -> PrunedFacts:
    """The facts of the fine-tuned checkpoint, whose parameters are counted in the loaded model."""
    after = count_params(model)
    if after != facts.params_after + added:
        raise FinetuneError(f"the fine-tuned model has {after} parameters, not the {facts.params_after} of its facts "
                            f"and {added} of the adapter; give the facts of the very checkpoint that is fine-tuned")
    return facts._replace(params_after=after, params_added=facts.params_added + added,
                          params_removed=1 - (after - facts.params_zeroed) / facts.params_before)


# Bad input ------------------------------------------------------------------------------------------------------------

def check_sizes(sequences: int, length: int, width: int, rank: int) -> None:
    """Raise FinetuneError if a model cannot be fine-tuned on so few or so short sequences, or with this rank."""
    if sequences < 2:
        raise FinetuneError(f"{sequences} sequence: one sequence is for training and one for judging; give at least 2")
    if length < 2:
        raise FinetuneError("sequences of 1 token have no next token to predict; give sequences of at least 2 tokens")
    if rank > width:
        raise FinetuneError(f"finetune.rank is {rank}, above the width of the states, {width}; give a lower rank")


def check_zeros(zeros: int, targets: str) -> None:
    """Raise FinetuneError if the changes would fill weights that pruning set to zero."""
    if zeros and targets == "linear":
        raise FinetuneError("finetune.targets is linear, and a change of the linear layers would fill the weights that "
                            "this method sets to zero; use targets: head")


def _check_finite(h_STD: Tensor, folder: Path) -> None:
    if not torch.isfinite(h_STD).all():
        raise FinetuneError(f"{folder}: final states are not finite; fine-tune in dtype float32, and if that does not "
                            "help, fold the checkpoint again")


def _check_models(dense: Path, pruned: Path, ids_ST: Tensor) -> None:
    one, other = AutoConfig.from_pretrained(dense), AutoConfig.from_pretrained(pruned)
    for name in ("hidden_size", "vocab_size"):
        if getattr(one, name) != getattr(other, name):
            raise FinetuneError(f"{name} is {getattr(one, name)} in the dense model and {getattr(other, name)} in the "
                                "pruned model; give the model that the checkpoint was pruned from")
    if family_of(one) != family_of(other):
        raise FinetuneError(f"the dense model is a {type_of(one)}, the pruned one a {type_of(other)}; give the model "
                            "that the checkpoint was pruned from")
    if getattr(other, "head_adapter", 0):
        raise FinetuneError(f"{pruned} is fine-tuned already (head_adapter {other.head_adapter}); give the checkpoint "
                            "that fold wrote")
    if not 0 <= int(ids_ST.min()) <= int(ids_ST.max()) < one.vocab_size:
        raise FinetuneError(f"vocabulary mismatch: token ids run from {int(ids_ST.min())} to {int(ids_ST.max())} and "
                            f"the model has {one.vocab_size} entries; use tokens of this model's tokenizer")
