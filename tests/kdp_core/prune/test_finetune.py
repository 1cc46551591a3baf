"""Fine-tuned variants: what is trained, what is written, what is kept; tied and untied heads, with stand-ins or not."""
import copy
import json
import math
import shutil

import pytest
import torch
from safetensors.torch import load_file

from kdp_core.base import store
from kdp_core.base.options import OptionError
from kdp_core.base.records import Module, Plan
from kdp_core.model import checkpoints, shards
from kdp_core.model.distil import distillation_loss, final_states, head_of
from kdp_core.model.sizes import count_macs
from kdp_core.prune import tuning
from kdp_core.prune.finetune import FinetuneError, finetune
from kdp_core.prune.fold import fold
from kdp_core.states.block import split
from tests import pico
from tests.kdp_core import stored

WIDTH, RANK = 32, 3
FAMILIES = ("llama", "opt", "qwen3")
"""Tied, tied with another layout, untied."""
IDS_ST = torch.arange(2, 26).view(2, 12)
OPTIONS = dict(rank=RANK, lr=0.005, epochs=2, kl_weight=0.9, batch_sequences=4, heldout=0.25)
"""Mostly distilled: an untrained dense model's next tokens have nothing to teach."""


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def plan(blocks):
    """Layers 2 and 3 dropped, and an affine stand-in near the identity for each block."""
    modules = [Module(block, "affine", {"width": WIDTH, "bypass_above": None},
                      {"map.weight": torch.eye(WIDTH) + 0.1 * randn(WIDTH, WIDTH), "map.bias": randn(WIDTH, seed=1)})
               for block in blocks]
    layers = sorted({2, 3, *(layer for start, stop in blocks for layer in range(start, stop))})
    return Plan("made_up", [(layer, "whole") for layer in layers], modules, {})


@pytest.fixture(scope="module")
def tokens():
    return stored.tokens(sequences=16, length=16)


@pytest.fixture(scope="module")
def made(tmp_path_factory, tokens):
    """By family and by whether there are stand-ins: folder, facts of fold, facts and record of finetune."""
    found = {}
    for family in FAMILIES:
        for blocks in ([], [(5, 7)]):
            root = tmp_path_factory.mktemp(family)
            pico.save(root / "dense", family)
            facts = fold(plan(blocks), root / "dense", root / "pruned")
            after, record = finetune(root / "dense", root / "pruned", root / "tuned", tokens, facts, **OPTIONS)
            found[family, bool(blocks)] = root, facts, after, record
    return found


CASES = [(family, blocks) for family in FAMILIES for blocks in (False, True)]


def logits(folder):
    with torch.no_grad():
        return checkpoints.load_model(folder)(IDS_ST).logits


def tensors(folder):
    return {name: tensor for path in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(path).items()}


@pytest.mark.parametrize("case", CASES)
def test_an_epoch_is_kept_that_beats_the_start_on_held_out_sequences(made, case):
    _, _, _, record = made[case]
    figures = [row["heldout_loss"] for row in record.curve]
    assert len(figures) == 3 and record.epoch > 0
    assert figures[record.epoch] == min(figures) < figures[0] - 0.001
    assert (record.sequences, record.heldout_sequences, record.tokens) == (12, 4, 12 * 15)


@pytest.mark.parametrize("case", CASES)
def test_parameters_are_counted_on_the_new_model(made, case):
    root, facts, after, record = made[case]
    added = 0 if case[0] == "qwen3" else 2 * RANK * WIDTH
    assert record.place == ("head" if case[0] == "qwen3" else "adapter") and record.params_added == added
    assert after.params_after == facts.params_after + added == checkpoints.load_model(root / "tuned").num_parameters()
    assert after.params_added == facts.params_added + added
    assert after.params_removed == pytest.approx(1 - after.params_after / facts.params_before)
    assert (after.blocks, after.layers_removed) == (facts.blocks, facts.layers_removed)
    macs = [count_macs(checkpoints.load_model(root / name)) for name in ("pruned", "tuned")]
    assert macs[1] - macs[0] == added


@pytest.mark.parametrize("case", CASES)
def test_only_the_head_has_changed(made, case):
    root, _, _, _ = made[case]
    before, after = tensors(root / "pruned"), tensors(root / "tuned")
    changed = {name for name in after if name not in before or not torch.equal(before[name], after[name])}
    assert set(before) <= set(after)
    assert changed == ({"lm_head.weight"} if case[0] == "qwen3" else {"head_adapter.a.weight", "head_adapter.b.weight"})
    if case[0] == "qwen3":
        # W -> W + s B A: of the rank asked for
        difference = (after["lm_head.weight"] - before["lm_head.weight"]).double()
        assert torch.linalg.matrix_rank(difference, rtol=1e-4) == RANK


@pytest.mark.parametrize("case", [case for case in CASES if case[0] != "qwen3"])
def test_the_adapter_acts_before_the_head_by_hand(made, case):
    root, _, _, _ = made[case]
    model, part = checkpoints.load_model(root / "pruned"), tensors(root / "tuned")
    h = final_states(model, IDS_ST).double()
    h = h + h @ part["head_adapter.a.weight"].double().T @ part["head_adapter.b.weight"].double().T
    expected = h @ model.lm_head.weight.detach().double().T
    torch.testing.assert_close(logits(root / "tuned").double(), expected, atol=1e-4, rtol=1e-4)
    assert (expected.float() - logits(root / "pruned")).abs().max() > 1e-2


@pytest.mark.parametrize("case", CASES)
def test_the_checkpoint_has_the_held_out_loss_that_chose_it(made, tokens, case):
    """What was judged in training, LoRA on a cached state, is what users get, whole models on tokens."""
    root, _, _, record = made[case]
    held, _ = split(len(tokens.ids_ST), OPTIONS["heldout"], 0)
    dense, model = (checkpoints.load_model(root / name) for name in ("dense", "tuned"))
    losses = distillation_loss(final_states(model, tokens.ids_ST[held]), final_states(dense, tokens.ids_ST[held]),
                               head_of(model), head_of(dense), tokens.ids_ST[held], kl_weight=OPTIONS["kl_weight"])
    assert losses.loss.item() == pytest.approx(record.curve[record.epoch]["heldout_loss"], rel=1e-4)


@pytest.mark.parametrize("case", CASES)
def test_it_generates_the_same_with_and_without_cache_and_after_saving_again(made, tmp_path, case):
    root, _, _, _ = made[case]
    model = checkpoints.load_model(root / "tuned")
    wanted = dict(max_new_tokens=6, do_sample=False, eos_token_id=None)
    cached = model.generate(IDS_ST, use_cache=True, **wanted)
    assert torch.equal(cached, model.generate(IDS_ST, use_cache=False, **wanted)) and cached.shape == (2, 18)
    model.save_pretrained(tmp_path / "again")
    assert torch.equal(logits(tmp_path / "again"), logits(root / "tuned"))
    assert checkpoints.load_tokenizer(root / "tuned")("rain")["input_ids"]


def test_a_copied_model_runs_its_own_adapter(made):
    model = checkpoints.load_model(made["llama", True][0] / "tuned")
    other = copy.deepcopy(model)
    with torch.no_grad():
        before = model(IDS_ST).logits
        other.head_adapter.b.weight.zero_()
        assert torch.equal(model(IDS_ST).logits, before) and not torch.equal(other(IDS_ST).logits, before)


def test_same_bits_again_whatever_was_drawn_before(made, tokens, tmp_path):
    root, facts, _, record = made["llama", True]
    torch.rand(7)
    state = torch.get_rng_state()
    _, again = finetune(root / "dense", root / "pruned", tmp_path / "again", tokens, facts, **OPTIONS)
    assert torch.equal(torch.get_rng_state(), state)
    assert [row | {"seconds": 0} for row in again.curve] == [row | {"seconds": 0} for row in record.curve]
    one, other = tensors(root / "tuned"), tensors(tmp_path / "again")
    assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def test_the_start_is_kept_where_training_only_hurts(made, tokens, tmp_path):
    root, facts, _, _ = made["llama", True]
    options = {**OPTIONS, "lr": 50.0, "clip": 1e6, "dropout": 0.0}
    after, record = finetune(root / "dense", root / "pruned", tmp_path / "out", tokens, facts, **options)
    assert record.epoch == 0 and record.curve[1]["heldout_loss"] > record.curve[0]["heldout_loss"]
    assert after == facts and record.params_added == 0
    assert {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()} == \
        {path.name: path.read_bytes() for path in (root / "pruned").iterdir()}


def test_perplexity_may_judge(made, tokens, tmp_path):
    root, facts, _, _ = made["qwen3", False]
    _, record = finetune(root / "dense", root / "pruned", tmp_path / "out", tokens, facts,
                         **{**OPTIONS, "judge": "ppl", "kl_weight": 0.0})
    figures = [row["heldout_ce_nats"] for row in record.curve]
    assert figures[record.epoch] == min(figures) and record.judge == "ppl"
    assert tuning.figure({"heldout_ce_nats": 2.0, "heldout_loss": 1.0}, "ppl") == 2.0
    assert tuning.figure({"heldout_ce_nats": 2.0, "heldout_loss": math.nan}, "loss") == math.inf


@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_shards_take_the_change_one_by_one(made, tokens, tmp_path, family):
    root, _, _, _ = made[family, True]
    facts = fold(plan([(5, 7)]), root / "dense", tmp_path / "pruned", shard_size="100KB")
    assert len(list((tmp_path / "pruned").glob("*.safetensors"))) > 2
    finetune(root / "dense", tmp_path / "pruned", tmp_path / "out", tokens, facts, **OPTIONS)
    assert torch.equal(logits(tmp_path / "out"), logits(root / "tuned"))
    index = json.loads((tmp_path / "out" / shards.INDEX).read_text())["weight_map"]
    assert set(index) == set(tensors(tmp_path / "out"))


def test_records_are_stored(made, tmp_path):
    _, _, _, record = made["llama", False]
    store.write(tmp_path / "finetuned.json", record)
    assert store.read(tmp_path / "finetuned.json") == record


@pytest.mark.parametrize("change, words", [
    (dict(rank=0), "^rank is 0; give a number at least 1"), (dict(rank=33), "rank is 33, above the width"),
    (dict(epochs=0), "^epochs is 0; give a number at least 1"), (dict(lr=0.0), "^lr is 0.0; give a number above 0"),
    (dict(dropout=1.0), "^dropout is 1.0; give a number below 1"),
    (dict(kl_weight=-0.1), "^kl_weight is -0.1; give a number at least 0"),
    (dict(temperature=0.0), "^temperature is 0.0; give a number above 0"),
    (dict(judge="acc"), "^judge is 'acc'; choose one of loss, ppl"),
])
def test_bad_options_are_named_before_anything_is_loaded(made, tokens, tmp_path, monkeypatch, change, words):
    root, facts, _, _ = made["llama", False]
    monkeypatch.setattr(checkpoints, "load_model", lambda *_, **__: pytest.fail("a model was loaded"))
    with pytest.raises((FinetuneError, OptionError), match=words):
        finetune(root / "dense", root / "pruned", tmp_path / "out", tokens, facts, **{**OPTIONS, **change})
    assert not (tmp_path / "out").exists()


def test_models_and_tokens_that_do_not_belong_together_are_named(made, tokens, tmp_path):
    root, facts, after, _ = made["llama", False]
    other = made["opt", False][0]
    with pytest.raises(FinetuneError, match="the dense model is a llama, the pruned one a opt"):
        finetune(root / "dense", other / "pruned", tmp_path / "out", tokens, facts)
    with pytest.raises(FinetuneError, match="fine-tuned already"):
        finetune(root / "dense", root / "tuned", tmp_path / "out", tokens, after)
    with pytest.raises(FinetuneError, match="vocabulary mismatch: token ids run from 0 to 384"):
        finetune(root / "dense", root / "pruned", tmp_path / "out",
                 tokens._replace(ids_ST=torch.tensor([[0, 384], [1, 2]])), facts)
    with pytest.raises(FinetuneError, match="1 sequence"):
        finetune(root / "dense", root / "pruned", tmp_path / "out", tokens._replace(ids_ST=IDS_ST[:1]), facts)
    shutil.copytree(root / "dense", tmp_path / "small")
    config = store.read_json(tmp_path / "small" / "config.json")
    store.write_json(tmp_path / "small" / "config.json", {**config, "vocab_size": 300})
    with pytest.raises(FinetuneError, match="vocab_size is 300 in the dense model and 384"):
        finetune(tmp_path / "small", root / "pruned", tmp_path / "out", tokens, facts)
    assert not (tmp_path / "out").exists()
