"""Fine-tuned variants of pruned checkpoints: LoRA trains the output head to match the dense model's outputs.

The method is that of KDP (Ma et al., ICLR 2026), appendix B; the paper's tables mark these variants with a dagger.
Everything except the head is frozen, including the stand-ins. The states that enter the head therefore never change
during the training. The states that enter the heads of both models are computed once. Only a low-rank change of the
head is trained on these states.

If the head has its own weight, the change is added to this weight, W -> W + s B A. This adds no parameter to the model.
If the head is tied to the embedding, adding the change to the weight would change the inputs as well. For a tied head
the change is therefore applied before the head, h -> h + s B A h (the paper's "logit adapter"). This adapter stays in
the model and has 2 r D parameters. The scale is s = alpha / r. B starts at zero, so the training starts at the
unchanged pruned model. The checkpoint gets the weights of the epoch with the best held-out loss or perplexity. The
start counts as an epoch. Measured by the held-out loss or perplexity, a fine-tuned variant is therefore never worse
than the pruned model.

The paper states neither the batch size nor the held-out share. The paper also does not state the unit of warm-up; in
this module the unit is one update. The paper uses validation perplexity to stop the training (`judge: ppl`). By
default, the held-out value of the training loss selects the epoch.
"""
import json
import logging
import math
import shutil
import time
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

import torch
from annotated_types import Ge, Lt
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR
from transformers import AutoConfig, PreTrainedModel

from kdp_core.base import provenance, store
from kdp_core.base.options import Chance, Count, Natural, Positive, check
from kdp_core.base.records import Finetuned, PrunedFacts, Tokens
from kdp_core.base.resume import OFF, Progress, Resume
from kdp_core.methods._train import copies, cosine, restore
from kdp_core.model import checkpoints, folded, shards
from kdp_core.model.distil import Head, Losses, distillation_loss, final_states, head_of
from kdp_core.model.families import family_of, type_of
from kdp_core.model.sizes import count_params
from kdp_core.states.block import split

logger = logging.getLogger(__name__)
PartialShare = Annotated[float, Ge(0), Lt(1)]
"""A share from 0 to below 1."""


class FinetuneError(ValueError):
    """Fine-tuning is not possible with these options, models or tokens."""


class States(NamedTuple):
    """The states that enter the output heads of both models, computed on the same sequences."""
    student_STD: Tensor
    teacher_STD: Tensor
    ids_ST: Tensor

    def at(self, sequences: Tensor) -> "States":
        """The states of the sequences with the numbers `sequences`."""
        return States(*(values[sequences] for values in self))


class Options(NamedTuple):
    """The options of the function `finetune`, which are described in its docstring."""
    rank: int
    alpha: float
    dropout: float
    lr: float
    epochs: int
    kl_weight: float
    temperature: float
    batch_sequences: int
    warmup: float
    clip: float
    heldout: float
    judge: str
    seed: int


def finetune(dense: Path, pruned: Path, out: Path, tokens: Tokens, facts: PrunedFacts, device: str = "cpu",
             dtype: str = "float32", resume: Resume = OFF, *, rank: Count = 8, alpha: Positive = 32.0,
             dropout: PartialShare = 0.05, lr: Positive = 1e-4, epochs: Count = 2, kl_weight: Chance = 0.5,
             temperature: Positive = 1.0, batch_sequences: Count = 8, warmup: PartialShare = 0.03,
             clip: Positive = 1.0, heldout: PartialShare = 0.1,
             judge: Literal["loss", "ppl"] = "loss", seed: Natural = 0) -> tuple[PrunedFacts, Finetuned]:
    """Fine-tune the head of the checkpoint in the folder `pruned`, write the new checkpoint to the folder `out`
    (atomic), and count its parameters.

    `facts` describes the checkpoint `pruned`. `dense` is the folder of the model from which `pruned` was made. `resume`
    is the file in which the state of the training is stored. The result is deterministic.
    rank: rank r of the low-rank change of the head.
    alpha: the change is scaled by alpha / rank.
    dropout: dropout of the input states of the low-rank change, only in training.
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
    options = Options(rank, alpha, dropout, lr, epochs, kl_weight, temperature, batch_sequences, warmup, clip, heldout,
                      judge, seed)
    check_sizes(*tokens.ids_ST.shape, checkpoints.config_of(dense).hidden_size, rank)
    _check_models(dense, pruned, tokens.ids_ST)
    teacher_STD, teacher, _ = _frozen(dense, tokens.ids_ST, device, dtype)
    student_STD, student, tied = _frozen(pruned, tokens.ids_ST, device, dtype)
    held, kept = split(len(tokens.ids_ST), heldout, seed)
    states = States(student_STD, teacher_STD, tokens.ids_ST)
    layer, curve, epoch = _train(student, teacher, tied, states.at(kept), states.at(held), options,
                                 resume)
    new = _write(Path(pruned), Path(out), _change(layer, student, tied) if epoch else {}, rank)
    facts_after = _count(new, facts, 2 * rank * student_STD.shape[-1] if epoch and tied else 0)
    return facts_after, Finetuned(
        "adapter" if tied else "head", rank, facts_after.params_added - facts.params_added, epoch, judge, curve,
        len(kept), len(held), len(kept) * (tokens.ids_ST.shape[1] - 1), options._asdict(),
        time.monotonic() - began + resume.earlier_s)


def _frozen(folder: Path, ids_ST: Tensor, device: str, dtype: str) -> tuple[Tensor, Head, bool]:
    """Final states of a checkpoint, its head, and whether the head is tied to the embedding. The memory of the rest of
    the model is freed."""
    model = checkpoints.load_model(folder, device=device, dtype=dtype).requires_grad_(False)
    h_STD = final_states(model, ids_ST)
    if not torch.isfinite(h_STD).all():
        raise FinetuneError(f"{folder}: final states are not finite; fine-tune in dtype float32, and if that does not "
                            "help, fold the checkpoint again")
    logger.info("final states of %d sequences, %s", len(ids_ST), type(model).__name__)
    return h_STD, head_of(model), model.lm_head.weight is model.get_input_embeddings().weight


# Training -------------------------------------------------------------------------------------------------------------

def _train(student: Head, teacher: Head, tied: bool, train: States, held: States,
           options: Options, resume: Resume) -> tuple[nn.Module, list[dict[str, Any]], int]:
    """Three results: the LoRA layer with its best weights, one entry for each epoch, and the number of the best
    epoch."""
    # peft and dropout use the global random generator, whose state is set here and restored afterwards
    cuda = [student.linear.weight.device] if student.linear.weight.is_cuda else []
    with torch.random.fork_rng(devices=cuda):
        torch.manual_seed(options.seed)
        layer = with_lora(student, tied, options.rank, options.alpha, options.dropout)
        weights = [weight for weight in layer.parameters() if weight.requires_grad]
        updates = options.epochs * math.ceil(len(train.ids_ST) / options.batch_sequences)
        optimiser = torch.optim.Adam(weights, lr=options.lr)
        rise = math.ceil(options.warmup * updates)
        schedule = LambdaLR(optimiser, lambda update: cosine(update, updates, warmup=rise))
        order = torch.Generator().manual_seed(options.seed)
        progress = Progress(resume, weights, {"adam": optimiser, "rate": schedule, "order": order,
                                              "dropout": _global(student.linear.weight.device)},
                            curve=[_entry(0, 0.0, None, None, _judge(student, teacher, held, options))], best=0,
                            best_weights=copies(weights), total=0.0, lr=None)
        values, curve = progress.values, progress.values["curve"]
        for epoch in progress.epochs(options.epochs):
            if progress.update == 0:
                values["lr"] = schedule.get_last_lr()[0]
            order_S = progress.order(lambda: torch.randperm(len(train.ids_ST), generator=order))
            student.train()
            for which in progress.updates(order_S.split(options.batch_sequences)):
                loss = _update(student, teacher, train.at(which), optimiser, options)
                values["total"] += loss * len(which) / len(order_S)
                schedule.step()
            loss, values["total"] = values["total"], 0.0
            seconds = progress.seconds() - sum(entry["seconds"] for entry in curve)
            with progress.judging():
                curve.append(_entry(epoch, seconds, values["lr"], loss, _judge(student, teacher, held, options)))
            if figure(curve[epoch], options.judge) < figure(curve[values["best"]], options.judge):
                values |= {"best": epoch, "best_weights": copies(weights)}
        restore(weights, values["best_weights"])
    return layer, curve, values["best"]


def with_lora(head: Head, tied: bool, rank: int, alpha: float, dropout: float) -> nn.Module:
    """Add peft's LoRA to the head, or to an identity map before a tied head. The weights are float32; A is random and B
    is zero."""
    from peft import LoraConfig, inject_adapter_in_model  # imported here, because the import takes seconds

    if tied:
        width = head.linear.weight.shape[1]
        head.adapter = nn.Linear(width, width, bias=False, device=head.linear.weight.device).requires_grad_(False)
        nn.init.eye_(head.adapter.weight)
    name = "adapter" if tied else "linear"
    inject_adapter_in_model(LoraConfig(r=rank, lora_alpha=alpha, lora_dropout=dropout, target_modules=[name]), head)
    layer = getattr(head, name)
    for weight in layer.parameters():
        if weight.requires_grad:
            weight.data = weight.data.float()
    return layer


def _global(device: torch.device) -> torch.Generator:
    """The random generator that dropout uses on this device."""
    return torch.cuda.default_generators[device.index or 0] if device.type == "cuda" else torch.default_generator


def _update(student: Head, teacher: Head, states: States, optimiser: torch.optim.Optimizer, options: Options) -> float:
    """One update on the sequences of `states`. Returns the mean loss over these sequences."""
    total, S = 0.0, len(states.ids_ST)
    # each forward pass has as many sequences as fit into one chunk of logits, so that nothing is computed twice
    size = max(1, student.chunk() // (states.ids_ST.shape[1] - 1))
    optimiser.zero_grad()
    for part in torch.arange(S).split(size):
        loss = len(part) / S * _losses(student, teacher, states.at(part), options).loss
        loss.backward()
        total += loss.item()
    nn.utils.clip_grad_norm_([w for group in optimiser.param_groups for w in group["params"]], options.clip)
    optimiser.step()
    return total


@torch.no_grad()
def _judge(student: Head, teacher: Head, held: States, options: Options) -> Losses:
    student.eval()
    return _losses(student, teacher, held, options)


def _losses(student: Head, teacher: Head, states: States, options: Options) -> Losses:
    return distillation_loss(states.student_STD, states.teacher_STD, student, teacher, states.ids_ST,
                             kl_weight=options.kl_weight, temperature=options.temperature)


def _entry(epoch: int, seconds: float, lr: float | None, loss: float | None, held: Losses) -> dict[str, Any]:
    entry = {"epoch": epoch, "seconds": seconds, "lr": lr, "loss": loss, "heldout_loss": held.loss.item(),
             "heldout_kl_nats": held.kl_nats.item(), "heldout_ce_nats": held.ce_nats.item()}
    logger.info("epoch %d: held-out loss %.4f, KL %.4f nats, perplexity %.2f", epoch, entry["heldout_loss"],
                entry["heldout_kl_nats"], math.exp(min(entry["heldout_ce_nats"], 99.0)))
    return entry


def figure(entry: dict[str, Any], judge: str) -> float:
    """The held-out number by which an epoch is judged; lower is better.

    If `judge` is ppl, this number is the cross-entropy. NaN counts as infinite.
    """
    value = entry["heldout_ce_nats" if judge == "ppl" else "heldout_loss"]
    return math.inf if math.isnan(value) else value


# To a checkpoint ------------------------------------------------------------------------------------------------------

@torch.no_grad()
def _change(layer: nn.Module, head: Head, tied: bool) -> dict[str, Tensor]:
    """Tensors that the old checkpoint does not have, or that differ from the old checkpoint's tensors."""
    scale = layer.scaling["default"]
    a_RD, b_OR = (part["default"].weight.float().cpu() for part in (layer.lora_A, layer.lora_B))
    if tied:
        # h -> h + (s B) (A h)
        return {"head_adapter.a.weight": a_RD, "head_adapter.b.weight": scale * b_OR}
    # W -> W + s B A
    return {"lm_head.weight": head.linear.weight.float().cpu() + scale * b_OR @ a_RD}


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
