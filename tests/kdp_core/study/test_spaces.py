"""Three spaces: literal NumPy for every measure, estimates exact to second order, layers left out by hand."""
import math

import numpy as np
import pytest
import torch
from scipy.spatial.distance import cosine
from scipy.special import log_softmax, rel_entr, softmax

from kdp_core.base import store
from kdp_core.base.records import Plan, Selection
from kdp_core.methods import slicegpt
from kdp_core.model import checkpoints
from kdp_core.model.surgery import drop_parts
from kdp_core.prune import fold
from kdp_core.states import hidden
from kdp_core.study import spaces
from tests import pico
from tests.kdp_core import stored


def drawn(*shape: int, seed: int = 0, scale: float = 1.0) -> torch.Tensor:
    return scale * torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def ids(windows: int = 6, tokens: int = 20) -> torch.Tensor:
    return torch.randint(8, 384, (windows, tokens), generator=torch.Generator().manual_seed(0))


def folded(dense, out, dropped, parts="whole"):
    fold.fold(Plan("test", [(layer, parts) for layer in dropped], [], {}), dense, out)
    return out


# measures

def test_measures_are_the_literal_formulas():
    h_ND, other_ND, z_NV, other_NV = drawn(4, 6), drawn(4, 6, seed=1), drawn(4, 9, seed=2), drawn(4, 9, seed=3)
    found = spaces.measures(h_ND, other_ND, z_NV, other_NV, 0.5)
    for n in range(4):
        a, b, z, y = (x[n].double().numpy() for x in (h_ND, other_ND, z_NV, other_NV))
        p, q, d = softmax(z / 0.5), softmax(y / 0.5), y - z
        along = (b - a) @ a / (a @ a)
        r = p ** 2 / (p ** 2).sum()
        five = np.argsort(-p)[:5]
        expected = {
            "angle_h": cosine(a, b), "angle_z": cosine(z, y), "angle_p": cosine(p, q), "kl": rel_entr(p, q).sum(),
            "parallel_h": abs(along), "orthogonal_h": np.linalg.norm(b - a - along * a) / np.linalg.norm(a),
            "estimate_p": (r @ d ** 2 - (r @ d) ** 2) / 0.5, "estimate_kl": (p @ d ** 2 - (p @ d) ** 2) / 0.5,
            "estimate_uniform": d.var() / 0.5, "estimate_top5": d[five].var() / 0.5,
            "agreement": float(p.argmax() == q.argmax())}
        for name, value in expected.items():
            assert found[name][n].item() == pytest.approx(value, rel=1e-6, abs=1e-12), name
        # |D|^2 = |D along a|^2 + |D_o|^2
        norm = np.linalg.norm(b - a) / np.linalg.norm(a)
        assert math.hypot(found["parallel_h"][n], found["orthogonal_h"][n]) == pytest.approx(norm, rel=1e-6)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_estimates_are_exact_to_second_order(temperature):
    z_NV, d_NV = drawn(3, 50).double(), drawn(3, 50, seed=1).double()
    h_ND, e_ND = drawn(3, 8, seed=2).double(), drawn(3, 8, seed=3).double()
    for space in ("h", "z", "p", "kl"):
        gaps = []
        for size in (1e-2, 1e-3):
            found = spaces.measures(h_ND, h_ND + size * e_ND, z_NV, z_NV + size * d_NV, temperature)
            measured = found["kl" if space == "kl" else f"angle_{space}"]
            gaps.append(((measured - found[f"estimate_{space}"]).abs() / measured).max().item())
        # the relative gap is of first order: ten times smaller where the change is
        assert gaps[1] < 2e-2 and gaps[1] == pytest.approx(gaps[0] / 10, rel=0.3), space


def test_a_shift_of_all_logits_changes_nothing_in_p():
    z_NV = drawn(3, 20)
    found = spaces.outputs(z_NV, z_NV + 7, 1.0)
    assert found["kl"].max() < 1e-9 and found["angle_p"].max() < 1e-9 and found["estimate_kl"].max() < 1e-9
    assert found["agreement"].tolist() == [1, 1, 1]


def test_small_angles_keep_their_digits():
    a_ND = torch.tensor([[1.0, 0.0]], dtype=torch.float64)
    for size in (1e-4, 1e-7):
        assert spaces.angle(a_ND, torch.tensor([[1.0, size]])).item() == pytest.approx(size ** 2 / 2, rel=1e-5)


def test_averages_and_their_errors_over_windows():
    row = spaces.averaged({"kl": torch.tensor([1.0, 3.0, 5.0, 7.0])}, 2)
    assert row == {"kl": 4.0, "kl_stderr": pytest.approx(2.0)}  # windows' means 2 and 6
    assert spaces.averaged({"kl": torch.ones(3)}, 1) == {"kl": 1.0, "kl_stderr": None}


# probe

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


@pytest.mark.parametrize("part", spaces.PARTS)
def test_a_probe_leaves_out_one_part_alone(pico_folder, part):
    record = spaces.probe(pico_folder, ids(), parts=[part], windows=3, positions=4)
    assert record.positions == [5, 10, 15, 19] and [row["layer"] for row in record.layers] == list(range(10))
    h_ND, z_NV, other_ND, other_NV = literal(pico_folder, ids()[:3], 4, part, record.positions)
    expected = spaces.averaged(spaces.measures(h_ND, other_ND, z_NV, other_NV, 1.0), 3)
    row = record.layers[4]
    assert {name: row[name] for name in expected} == pytest.approx(expected, rel=1e-3, abs=1e-7)
    assert len(record.tokens) == 30 and {row["window"] for row in record.tokens} == {0, 1, 2}


def test_the_reading_without_the_final_norm_changes_inner_logits_alone(llama_folder):
    ours, theirs = (spaces.probe(llama_folder, ids(), parts=["mlp"], windows=2, positions=3, final_norm=flag)
                    for flag in (True, False))
    assert ours.layers[3]["angle_h"] == theirs.layers[3]["angle_h"]
    assert ours.layers[3]["kl"] != pytest.approx(theirs.layers[3]["kl"], rel=1e-2)
    assert ours.layers[9] == theirs.layers[9]


# compare

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
        composed = slicegpt.compose(tmp_path / "dense", hidden.read(tmp_path / "h.zarr"), data, selection, slicing=share)
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


def test_candidates_alone_beside_all_tokens():
    z_NV, other_NV = drawn(1, 12, scale=3), drawn(1, 12, seed=1, scale=3)
    found = spaces.restricted(z_NV, other_NV, [2, 5, 7], 1.0)
    p, q = (softmax(x[0].double().numpy()) for x in (z_NV, other_NV))
    few_p, few_q = (x[[2, 5, 7]] / x[[2, 5, 7]].sum() for x in (p, q))
    expected = {"kl": rel_entr(p, q).sum(), "kl_candidates": rel_entr(few_p, few_q).sum(),
                "angle_p_candidates": cosine(few_p, few_q), "mass": p[[2, 5, 7]].sum(),
                "mass_other": q[[2, 5, 7]].sum(),
                "rank": 1 + (p > p[[2, 5, 7]].max()).sum(),
                "agreement_candidates": float(few_p.argmax() == few_q.argmax())}
    assert {name: found[name].item() for name in expected} == pytest.approx(expected, rel=1e-6)


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
    (lambda at: spaces.probe(at, ids(), parts=["heads"]), "names 'heads'; choose among attention, mlp, whole"),
    (lambda at: spaces.probe(at, ids(), windows=7), "7 windows asked for, there are 6"),
    (lambda at: spaces.probe(at, ids(), windows=2, positions=20), "positions 20: windows have 20 tokens"),
    (lambda at: spaces.probe(at, ids(), windows=2, temperature=0.0), "temperature 0.0 is not above 0"),
    (lambda at: spaces.compare(at, at, ids(), [], dropped=[], prompts=2), "prompts of 64 tokens"),
    (lambda at: spaces.compare(at, at, ids(), [], dropped=[3], prompts=2, prompt_tokens=4), "dropped names 1 layers"),
    (lambda at: spaces.compare(at, at, ids(), [spaces.Choice("rain", ["stops"])], dropped=[], prompts=1,
                               prompt_tokens=4, steps=1), "item 0 has 1 choices"),
])
def test_what_cannot_be_compared_is_refused(llama_folder, call, message):
    with pytest.raises(spaces.SpacesError, match=message):
        call(llama_folder)
