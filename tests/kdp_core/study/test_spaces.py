"""What pruning does in three spaces, against layers left out by hand and continuations by transformers."""

import numpy as np
import pytest
import torch
from scipy.special import log_softmax

from kdp_core.base import store
from kdp_core.base.options import OptionError
from kdp_core.base.records import Plan, Selection
from kdp_core.methods import slicegpt
from kdp_core.model import checkpoints
from kdp_core.model.surgery import drop_parts
from kdp_core.prune import fold
from kdp_core.states import hidden
from kdp_core.study import distances, spaces
from tests import pico
from tests.kdp_core import stored


def drawn(*shape: int, seed: int = 0, scale: float = 1.0) -> torch.Tensor:
    return scale * torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def ids(windows: int = 6, tokens: int = 20) -> torch.Tensor:
    return torch.randint(8, 384, (windows, tokens), generator=torch.Generator().manual_seed(0))


def folded(dense, out, dropped, parts="whole"):
    fold.fold(Plan("test", [(layer, parts) for layer in dropped], [], {}), dense, out)
    return out


def literal(folder, ids_ST, layer, part, positions):
    """States after `layer` and their logits, the dense model's and with one part gone, by transformers itself."""
    found = []
    for left_out in (False, True):
        model = checkpoints.load_model(folder)
        if left_out and part != "whole":
            drop_parts(model, {part: [layer]})
        states = {}
        decoder = model.model.decoder if hasattr(model.model, "decoder") else model.model
        # a layer's output is what the next one reads
        decoder.layers[layer].register_forward_hook(
            lambda _, args, output, states=states: states.update(
                before=args[0], after=output[0] if isinstance(output, tuple) else output))
        with torch.no_grad():
            model(ids_ST)
            h_BTD = states["before" if left_out and part == "whole" else "after"]
            norm = getattr(decoder, "final_layer_norm", None) or decoder.norm
            found += [h_BTD[:, positions].flatten(0, 1), model.lm_head(norm(h_BTD[:, positions])).flatten(0, 1)]
    return found


@pytest.mark.parametrize("part", ["attention", "mlp", "whole"])
def test_a_probe_leaves_out_one_part_alone(pico_folder, part):
    record = spaces.probe(pico_folder, ids(), parts=[part], windows=3, positions=4)
    assert record.positions == [5, 10, 15, 19] and [row["layer"] for row in record.layers] == list(range(10))
    h_ND, z_NV, other_ND, other_NV = literal(pico_folder, ids()[:3], 4, part, record.positions)
    expected = distances.averaged(distances.measures(h_ND, other_ND, z_NV, other_NV, 1.0), 3)
    row = record.layers[4]
    assert {name: row[name] for name in expected} == pytest.approx(expected, rel=1e-3, abs=1e-7)
    assert len(record.tokens) == 30 and {row["window"] for row in record.tokens} == {0, 1, 2}


def test_the_reading_without_the_final_norm_changes_inner_logits_alone(llama_folder):
    ours, theirs = (spaces.probe(llama_folder, ids(), parts=["mlp"], windows=2, positions=3, final_norm=flag)
                    for flag in (True, False))
    assert ours.layers[3]["angle_h"] == theirs.layers[3]["angle_h"]
    assert ours.layers[3]["kl"] != pytest.approx(theirs.layers[3]["kl"], rel=1e-2)
    assert ours.layers[9] == theirs.layers[9]


def test_a_model_beside_itself_differs_in_nothing(llama_folder):
    items = [spaces.Choice("rain would reach", ["the coast", "the north", "winter"])]
    record = spaces.compare(llama_folder, llama_folder, ids(), items, dropped=[], prompts=2, prompt_tokens=8, steps=3)
    assert [row["state"] for row in record.depth] == list(range(11)) and len(record.decoding) == 6
    for row in record.decoding:
        assert row["kl"] < 1e-9 and row["angle_h"] < 1e-9 and row["agreement"] == row["same_text"] == 1
    answer, = record.choices
    assert answer["kl_candidates"] < 1e-9 and answer["mass"] == answer["mass_other"] and answer["candidates"] == 3


def test_decoding_is_what_generate_gives_and_both_histories_are_read(llama_folder, tmp_path):
    pruned = folded(llama_folder, tmp_path / "pruned", [3, 4])
    record = spaces.compare(llama_folder, pruned, ids(), [], dropped=[3, 4], prompts=3, prompt_tokens=8, steps=5)
    assert [row["state"] for row in record.depth] == [0, 1, 2, 5, 6, 7, 8, 9, 10] and record.choices == []
    prompt_BT, dense, other = ids()[:3, :8], checkpoints.load_model(llama_folder), checkpoints.load_model(pruned)
    said = {name: model.generate(prompt_BT, attention_mask=torch.ones_like(prompt_BT), do_sample=False,
                                 max_new_tokens=5, eos_token_id=383, pad_token_id=0)[:, 8:]
            for name, model in (("dense", dense), ("own", other))}
    assert torch.equal(spaces.greedy(dense, prompt_BT, 5), said["dense"])
    with torch.no_grad():
        z_BTV = dense(torch.cat((prompt_BT, said["dense"]), 1)).logits[:, 7:-1]
        for history in ("dense", "own"):
            y_BTV = other(torch.cat((prompt_BT, said[history]), 1)).logits[:, 7:-1]
            logp, logq = (log_softmax(x.double().numpy(), axis=-1) for x in (z_BTV, y_BTV))
            kl_BG = (np.exp(logp) * (logp - logq)).sum(-1)
            rows = [row for row in record.decoding if row["history"] == history]
            assert [row["kl"] for row in rows] == pytest.approx(kl_BG.mean(0), rel=1e-3)
            assert [row["kl_stderr"] for row in rows] == pytest.approx(kl_BG.std(0, ddof=1) / 3 ** 0.5, rel=1e-3)
    same = (said["dense"] == said["own"]).numpy()
    assert [row["same_text"] for row in record.decoding[:5]] == pytest.approx(np.cumprod(same, 1).mean(0))
    # the first step reads the prompt alone
    assert record.decoding[0]["kl"] == pytest.approx(record.decoding[5]["kl"])


def test_the_gap_grows_with_the_number_of_layers_gone(llama_folder, tmp_path):
    kls = []
    for gone in ([4], [4, 5, 6], [2, 3, 4, 5, 6, 7]):
        pruned = folded(llama_folder, tmp_path / str(len(gone)), gone)
        record = spaces.compare(llama_folder, pruned, ids(), [], dropped=gone, prompts=6, prompt_tokens=12, steps=4)
        kls.append(np.mean([row["kl"] for row in record.decoding if row["history"] == "dense"]))
    assert kls[0] < kls[1] < kls[2]


@pytest.mark.parametrize("family", ["llama", "opt"])
def test_a_sliced_model_is_compared_in_the_dense_models_basis(family, tmp_path):
    model, data = pico.lively(pico.model(family, layers=4)), stored.tokens()
    pico.tokenizer().save_pretrained(tmp_path / "dense")
    model.save_pretrained(tmp_path / "dense")
    hidden.extract(model, data, tmp_path / "h.zarr", layers=[0], dtype="float32")
    selection = Selection([], [], "weights", 0.1, 0.1, 0.9, 3, [], 0)
    records = {}
    for share in (0.0, 0.25):
        composed = slicegpt.compose(tmp_path / "dense", hidden.read(tmp_path / "h.zarr"), data, selection,
                                    slicing=share)
        fold.fold(composed.plan, tmp_path / "dense", tmp_path / str(share))
        records[share] = spaces.compare(tmp_path / "dense", tmp_path / str(share), ids(), [], dropped=[], prompts=2,
                                        prompt_tokens=12, steps=3)
    assert all(row[name] < 1e-5 for row in [*records[0.0].depth, *records[0.0].decoding]
               for name in ("angle_h", "angle_z", "angle_p", "kl"))
    cut = records[0.25]
    assert [row["state"] for row in cut.depth] == [0, 1, 2, 3, 4]
    assert all(1e-5 < row["angle_h"] < 1 and row["kl"] > 0 for row in cut.depth)
    text_BT = torch.cat((ids()[:2, :12], spaces.greedy(model, ids()[:2, :12], 3)), dim=1)
    with torch.no_grad():
        logp, logq = (log_softmax(one(text_BT).logits[:, 11:-1].double().numpy(), axis=-1)
                      for one in (model, checkpoints.load_model(tmp_path / "0.25")))
    assert cut.depth[-1]["kl"] == pytest.approx((np.exp(logp) * (logp - logq)).sum(-1).mean(), rel=1e-3)


def test_an_item_is_asked_for_a_letter():
    text = spaces.prompt_of(spaces.Choice("rain would", ["stop", "go on"]))
    assert text == "How does this text go on?\nrain would\nA. stop\nB. go on\nAnswer:"


def test_records_come_back_from_disk(llama_folder, tmp_path):
    for record in (spaces.probe(llama_folder, ids(), parts=["whole"], windows=1, positions=2),
                   spaces.compare(llama_folder, llama_folder, ids(), [], dropped=[], prompts=1, prompt_tokens=4,
                                  steps=1)):
        store.write(tmp_path / "spaces.json", record)
        assert store.read(tmp_path / "spaces.json") == record


@pytest.mark.parametrize("call, message", [
    (lambda at: spaces.probe(at, ids(), parts=["heads"]), r"parts is \['heads'\]; choose one of attention, mlp, whole"),
    (lambda at: spaces.probe(at, ids(), windows=7), "asks for 7 windows, but the held-out text has 6"),
    (lambda at: spaces.probe(at, ids(), windows=2, positions=20), "positions is 20, but windows have 20 tokens"),
    (lambda at: spaces.probe(at, ids(), windows=2, temperature=0.0), "temperature is 0.0; give a number above 0"),
    (lambda at: spaces.compare(at, at, ids(), [], dropped=[], prompts=2), "prompt_tokens is 64, but windows have 20"),
    (lambda at: spaces.compare(at, at, ids(), [], dropped=[3], prompts=2, prompt_tokens=4), "dropped names 1 layers"),
    (lambda at: spaces.compare(at, at, ids(), [spaces.Choice("rain", ["stops"])], dropped=[], prompts=1,
                               prompt_tokens=4, steps=1), "item 0 has 1 choices"),
])
def test_what_cannot_be_compared_is_refused(llama_folder, call, message):
    with pytest.raises((spaces.SpacesError, OptionError), match=message):
        call(llama_folder)
