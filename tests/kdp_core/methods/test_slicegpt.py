"""Slicing: beside a walk through the dense model in float64 whose states NumPy projects; widths by a literal count."""
import copy
import itertools
import math
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from transformers import LlamaConfig

from kdp_core.base.records import Selection
from kdp_core.methods import slicegpt
from kdp_core.methods._select import BlockError
from kdp_core.model import checkpoints, families
from kdp_core.model.families import decoder_layers, family_of
from kdp_core.model.sizes import count_macs
from kdp_core.prune.finetune import finetune
from kdp_core.prune.fold import fold
from kdp_core.score import diagnose
from kdp_core.states import hidden
from kdp_core.states.bases import bases_of
from kdp_core.states.block import FitError
from kdp_core.states.hidden import boundary_states
from tests import pico
from tests.kdp_core import stored

DATA = stored.tokens()
FAMILIES = ("llama", "opt", "qwen3", "mistral")
LAYERS, D = 4, 32


class Dense(NamedTuple):
    """A checkpoint with its states."""
    family: str
    folder: Any
    model: Any
    hidden: Any


def dense_of(root, family, model):
    model.save_pretrained(root / "model")
    hidden.extract(model, DATA, root / "h.zarr", layers=[0], dtype="float32")
    return Dense(family, root / "model", model, hidden.read(root / "h.zarr"))


@pytest.fixture(scope="module", params=FAMILIES)
def dense(request, tmp_path_factory):
    """Norms and biases off their untrained 1 and 0."""
    model = pico.lively(pico.model(request.param, layers=LAYERS))
    return dense_of(tmp_path_factory.mktemp(request.param), request.param, model)


def composed(dense, ratio=0.1, **options):
    selection = Selection([], [], "weights", ratio, ratio, 0.9, 3, [], 0)
    return slicegpt.compose(dense.folder, dense.hidden, DATA, selection, **options)


def sliced_model(dense, out, **options):
    """(facts, model) at a share of the width."""
    facts = fold(composed(dense, **options).plan, dense.folder, out)
    return facts, checkpoints.load_model(out)


@torch.no_grad()
def logits(model, ids_ST=DATA.ids_ST):
    return model(ids_ST).logits


# what a sliced model computes

def principal(x_ND, width):
    """NumPy's projection on the principal directions of states, and these."""
    values, vectors = np.linalg.eigh(x_ND.T @ x_ND)
    q_DE = vectors[:, np.argsort(-values, kind="stable")][:, :width]
    return torch.from_numpy(q_DE @ q_DE.T), q_DE


def centred(x, family):
    return x - x.mean(-1, keepdim=True) if family == "opt" else x


@torch.no_grad()
def walked(dense, width):
    """Logits of the dense model in float64 with every state projected before it is read, and all projections' bases.

    The attention runs inside its layer; what it adds is read off its hook.
    """
    model, family, bases = copy.deepcopy(dense.model).double(), dense.family, []
    layers, caught = decoder_layers(model), {}

    def keep(name):
        return lambda _, args, output: caught.__setitem__(name, output[0] if isinstance(output, tuple) else output)

    def project(h, width=width):
        h = centred(h, family)
        p_DD, q_DE = principal(h.flatten(0, 1).numpy(), width)
        bases.append(q_DE)
        return h @ p_DD

    def before(layer, args, kwargs):
        return (project(args[0]),), kwargs

    def after(layer, args, kwargs, output):
        # the layer's own output went past the projection between its parts
        y = project(args[0] + caught["attention"])
        if family == "opt":
            return y + layer.fc2(torch.relu(layer.fc1(layer.final_layer_norm(y))))
        x = layer.post_attention_layernorm(y)
        gate = layer.mlp.gate_proj(x)
        return y + layer.mlp.down_proj(gate * torch.sigmoid(gate) * layer.mlp.up_proj(x))

    for layer in layers:
        layer.self_attn.register_forward_hook(keep("attention"))
        layer.register_forward_pre_hook(before, with_kwargs=True)
        layer.register_forward_hook(after, with_kwargs=True)
    norm = model.model.decoder.final_layer_norm if family == "opt" else model.model.norm
    norm.register_forward_pre_hook(lambda _, args: (project(args[0]),))
    return model(DATA.ids_ST, use_cache=False).logits, bases


@pytest.mark.parametrize("family", [name for name, record in families.FAMILIES.items()
                                    if not slicegpt.refuses(record) and name not in FAMILIES])
def test_nothing_sliced_computes_the_dense_models_logits_in_the_other_families(family, tmp_path):
    """Fused matrices, biases of some readers only."""
    case = dense_of(tmp_path, family, pico.lively(pico.model(family, layers=2)))
    _, model = sliced_model(case, tmp_path / "out", slicing=0.0)
    torch.testing.assert_close(logits(model), logits(case.model), atol=1e-4, rtol=1e-4)


def test_nothing_sliced_computes_the_dense_models_logits(dense, tmp_path):
    facts, model = sliced_model(dense, tmp_path / "out", slicing=0.0)
    torch.testing.assert_close(logits(model), logits(dense.model), atol=1e-4, rtol=1e-4)
    # two matrices a layer, and a head of its own
    added = 2 * LAYERS * D * D + (384 * D if dense.model.config.tie_word_embeddings else 0)
    norms = sum(tensor.numel() for name, tensor in dense.model.named_parameters()
                if "norm" in name and ".self_attn." not in name)
    bias = 384 if dense.family == "opt" else 0
    assert facts.params_after == facts.params_before + added + bias - norms


@pytest.mark.parametrize("width", [24, 16])
def test_sliced_logits_are_those_of_the_dense_model_on_projected_states(dense, tmp_path, width):
    _, model = sliced_model(dense, tmp_path / "out", slicing=1 - width / D, slice_head=True)
    expected, bases = walked(dense, width)
    torch.testing.assert_close(logits(model).double(), expected, atol=1e-3, rtol=1e-3)
    assert (expected - logits(dense.model)).abs().max() > 0.1
    # the first attention's matrix is Q_0' Q_1, up to the signs of the eigenvectors
    found = decoder_layers(model)[0].attention_shortcut.weight.detach().numpy()
    np.testing.assert_allclose(np.abs(found), np.abs(bases[1].T @ bases[0]), atol=1e-3)


def test_matrices_of_the_first_layer_by_hand(dense):
    """The readers of layer 0 with the norm's gain, in the basis of the embedding's states."""
    tensors = composed(dense, slicing=0.25).plan.tensors
    h_ND = centred(dense.hidden.state(0), dense.family).flatten(0, 1).double().numpy()
    q_DE = np.linalg.eigh(h_ND.T @ h_ND).eigenvectors[:, ::-1][:, :24]
    q_DE = q_DE * np.sign(q_DE[np.abs(q_DE).argmax(0), np.arange(24)])
    layer, prefix = decoder_layers(dense.model)[0], family_of(dense.family).prefix
    norm = layer.self_attn_layer_norm if dense.family == "opt" else layer.input_layernorm
    w_RD, gain_D = (t.detach().double().numpy() for t in (layer.self_attn.q_proj.weight, norm.weight))
    np.testing.assert_allclose(tensors[f"{prefix}0.self_attn.q_proj.weight"], w_RD @ np.diag(gain_D) @ q_DE, atol=1e-5)
    embedding_VD = dense.model.get_input_embeddings().weight.detach().double()
    name = f"{prefix.removesuffix('layers.')}embed_tokens.weight"
    np.testing.assert_allclose(tensors[name], centred(embedding_VD, dense.family).numpy() @ q_DE, atol=1e-5)
    if dense.family == "opt":
        bias_R = layer.self_attn.q_proj.bias.detach().double().numpy() + w_RD @ norm.bias.detach().double().numpy()
        np.testing.assert_allclose(tensors[f"{prefix}0.self_attn.q_proj.bias"], bias_R, atol=1e-5)


def test_basis_is_orthonormal_and_its_signs_are_fixed():
    x_STD = torch.randn(4, 16, 8, generator=torch.Generator().manual_seed(0)) * torch.arange(1, 9)
    q_DE, row = slicegpt._basis(x_STD, 5, None, 3, torch.device("cpu"))
    torch.testing.assert_close(q_DE.T @ q_DE, torch.eye(5, dtype=torch.float64))
    assert (q_DE.gather(0, q_DE.abs().argmax(0, keepdim=True)) > 0).all()
    values = np.linalg.eigvalsh((x_STD.flatten(0, 1).T @ x_STD.flatten(0, 1)).double().numpy())[::-1]
    assert row == {"kept": pytest.approx(values[:5].sum() / values.sum(), rel=1e-6), "masked": 0}
    torch.testing.assert_close(slicegpt._basis(x_STD, 5, None, 4, torch.device("cpu"))[0], q_DE)


def test_massive_tokens_come_first_or_are_left_out():
    x_STD = torch.randn(4, 16, 8, generator=torch.Generator().manual_seed(0))
    x_STD[..., 3] *= 0.01
    plain, _ = slicegpt._basis(x_STD, 3, None, 4, torch.device("cpu"))
    x_STD[:, 0, 3] = 1000.0
    raw, _ = slicegpt._basis(x_STD, 3, None, 4, torch.device("cpu"))
    masked, row = slicegpt._basis(x_STD, 3, 8.0, 4, torch.device("cpu"))
    assert raw[3, 0] > 0.999 and masked[3].abs().max() < 0.02 and row["masked"] == 4
    x_STD = x_STD[:, 1:]
    torch.testing.assert_close(slicegpt._basis(x_STD, 3, None, 4, torch.device("cpu"))[0], masked)
    assert plain[3].abs().max() < 0.02


def test_generation_is_the_same_with_and_without_cache_and_states_are_recorded(dense, tmp_path):
    _, model = sliced_model(dense, tmp_path / "out", slicing=0.25)
    ids_ST = DATA.ids_ST[:2, :12]
    runs = [model.generate(ids_ST, attention_mask=torch.ones_like(ids_ST), max_new_tokens=12, min_new_tokens=12,
                           do_sample=False, use_cache=cached) for cached in (True, False)]
    assert torch.equal(*runs)
    with torch.no_grad():
        states = model(ids_ST, output_hidden_states=True).hidden_states
    assert [state.shape[-1] for state in states] == [24] * LAYERS + [D]


def test_half_precision_folds(dense, tmp_path):
    copy.deepcopy(dense.model).half().save_pretrained(tmp_path / "half")
    plan = composed(dense, slicing=0.25).plan
    fold(plan, tmp_path / "half", tmp_path / "out")
    fold(plan, dense.folder, tmp_path / "whole")
    half, whole = (logits(checkpoints.load_model(tmp_path / name, dtype=dtype)).float()
                   for name, dtype in (("out", "float16"), ("whole", "float32")))
    assert (half - whole).norm() < 0.05 * whole.norm()


# widths and shares

def literal(config, width, final):
    """Parameters of a sliced model, matrix by matrix."""
    d, heads, V = config.hidden_size, config.num_attention_heads, config.vocab_size
    if config.model_type == "opt":
        f = config.ffn_dim
        total = (V + config.max_position_embeddings + 2) * width
        layer = 3 * (d * width + d) + f * width + f + 2 * width ** 2
        writers = [(d, 1), (f, 1)]
    else:
        size = getattr(config, "head_dim", None) or d // heads
        q, kv, f = heads * size, config.num_key_value_heads * size, config.intermediate_size
        total = V * width
        layer = (q + 2 * kv) * width + 2 * f * width + 2 * width ** 2 + \
            (2 * size if config.model_type == "qwen3" else 0)
        writers = [(q, 0), (f, 0)]
    layer += sum((inner + bias) * width for inner, bias in writers)
    total += config.num_hidden_layers * layer
    # the last MLP writes the final state
    inner, bias = writers[1]
    total += (inner + bias) * (final - width) + width * (final - width)
    return total + V * final + (V if config.model_type == "opt" else 0)


@pytest.mark.parametrize("slice_head", [False, True])
@pytest.mark.parametrize("ratio", [0.05, 0.2])
def test_width_is_the_multiple_nearest_to_the_ratio(dense, tmp_path, ratio, slice_head):
    found = composed(dense, ratio, multiple=2, slice_head=slice_head)
    total = dense.model.num_parameters()
    shares = {width: 1 - literal(dense.model.config, width, width if slice_head else D) / total
              for width in range(2, D + 1, 2)}
    width = min(shares, key=lambda width: abs(shares[width] - ratio))
    assert found.stats["width"] == width and found.stats["share_of_all"] == pytest.approx(shares[width], abs=1e-12)
    assert found.stats["width_removed"] == 1 - width / D and found.stats["ratio_read"]
    facts = fold(found.plan, dense.folder, tmp_path / "out")
    assert facts.params_removed == pytest.approx(shares[width], abs=1e-12) and facts.params_zeroed == 0
    assert facts.params_after == literal(dense.model.config, width, width if slice_head else D)
    assert abs(facts.params_removed - ratio) < 0.05
    model = checkpoints.load_model(tmp_path / "out")
    assert count_macs(model) == sum(module.weight.numel() for module in model.modules()
                                           if isinstance(module, torch.nn.Linear))


@pytest.mark.parametrize("config, shares", [
    (dict(intermediate_size=11008, vocab_size=32000, num_key_value_heads=32), (9.4, 15.3, 21.45, 27.5, 33.2)),
    (dict(intermediate_size=14336, vocab_size=128256, num_key_value_heads=8), (10.1, 15.6, 21.3, 26.9, 32.3)),
], ids=["LLaMA-2-7B", "LLaMA-3-8B"])
def test_published_models_sliced_by_20_to_40_percent_of_their_width(config, shares):
    """Counted apart from this code for the released defaults; 15.3 % is what KDP lists as 25.4 % of LLaMA-2-7B."""
    config = LlamaConfig(hidden_size=4096, num_hidden_layers=32, num_attention_heads=32, tie_word_embeddings=False,
                         **config)
    for slicing_share, share in zip((0.2, 0.25, 0.3, 0.35, 0.4), shares, strict=True):
        found = slicegpt._share(config, slicegpt.cut(4096, slicing_share, 8), False)
        assert 100 * found == pytest.approx(share, abs=0.06)


@pytest.mark.parametrize("width, slicing_share, expected", [(4096, 0.2, 3272), (4096, 0.25, 3072), (4096, 0.3, 2864),
                                                            (4096, 0.35, 2656), (4096, 0.4, 2456), (32, 0.0, 32),
                                                            (80, 0.9, 8)])
def test_width_of_a_share_is_rounded_down_to_a_multiple(width, slicing_share, expected):
    assert slicegpt.cut(width, slicing_share, 8) == expected


def test_a_share_of_the_width_leaves_the_ratio_unread_and_may_add_parameters(dense, tmp_path):
    """A tied model pays for a head of its own."""
    found = composed(dense, 0.9, slicing=0.25)
    assert found.stats["width"] == 24 and found.stats["width_removed"] == 0.25 and not found.stats["ratio_read"]
    facts = fold(found.plan, dense.folder, tmp_path / "out")
    assert facts.params_removed == pytest.approx(found.stats["share_of_all"])
    assert (facts.params_removed < 0) == dense.model.config.tie_word_embeddings


# beside the other stages

def test_bases_are_read_off_the_weights(dense, tmp_path):
    _, model = sliced_model(dense, tmp_path / "out", slicing=0.25)
    _, bases = walked(dense, 24)
    found = bases_of(dense.model, model)
    assert [q_DE.shape for q_DE in found] == [(D, 24)] * LAYERS + [(D, D)]
    for q_DE, expected in zip(found[:-1], bases[::2], strict=False):
        torch.testing.assert_close(q_DE.T @ q_DE, torch.eye(24), atol=1e-3, rtol=0)
        np.testing.assert_allclose((q_DE @ q_DE.T).numpy(), expected @ expected.T, atol=1e-3)


def test_diagnosis_compares_states_in_the_dense_models_basis(dense, tmp_path):
    ids_ST = DATA.ids_ST[:6]
    sliced_model(dense, tmp_path / "whole", slicing=0.0)
    got = diagnose.diagnose(dense.folder, tmp_path / "whole", ids_ST, dropped=[], windows=6)
    assert got.states == list(range(LAYERS + 1)) and max(got.error) < 1e-6 and min(got.cosine) > 1 - 1e-6
    assert got.kl_nats == pytest.approx(0, abs=1e-6) and got.agreement == 1
    _, model = sliced_model(dense, tmp_path / "out", slicing=0.25)
    got = diagnose.diagnose(dense.folder, tmp_path / "out", ids_ST, dropped=[], windows=6)
    # of the embedding's state the error is what the projection leaves out
    h_ND = centred(boundary_states(dense.model, ids_ST, [0])[0], dense.family).flatten(0, 1).double().numpy()
    p_DD, _ = principal(centred(dense.hidden.state(0), dense.family).flatten(0, 1).double().numpy(), 24)
    left = ((h_ND - h_ND @ p_DD.numpy()) ** 2).sum() / ((h_ND - h_ND.mean(0)) ** 2).sum()
    assert got.error[0] == pytest.approx(left, rel=1e-2) and got.error[0] > 0
    logp, logq = (logits(one, ids_ST)[:, :-1].double().log_softmax(-1) for one in (dense.model, model))
    assert got.kl_nats == pytest.approx((logp.exp() * (logp - logq)).sum(-1).mean().item(), rel=1e-3)


@pytest.mark.parametrize("slice_head", [False, True])
def test_fine_tuned_variant_changes_the_head_alone(dense, tmp_path, slice_head):
    facts, before = sliced_model(dense, tmp_path / "out", slicing=0.25, slice_head=slice_head)
    after, record = finetune(dense.folder, tmp_path / "out", tmp_path / "tuned", DATA, facts, rank=3, lr=0.001,
                             kl_weight=1.0, heldout=0.25, batch_sequences=4)
    assert record.place == "head" and record.epoch > 0 and after.params_after == facts.params_after
    tuned = checkpoints.load_model(tmp_path / "tuned")
    was, now = before.state_dict(), tuned.state_dict()
    assert [name for name in was if not torch.equal(now[name], was[name])] == ["lm_head.weight"]
    rank = torch.linalg.matrix_rank(tuned.lm_head.weight - before.lm_head.weight, rtol=1e-2)
    assert rank <= 3 and record.curve[record.epoch]["heldout_kl_nats"] < record.curve[0]["heldout_kl_nats"]


# refusals

def test_refusals(dense):
    with pytest.raises(BlockError, match=r"ratio 0\.99 is too high: all that slicegpt can remove, at width 8, is 0\."):
        composed(dense, 0.99)
    for options, message in [({"slicing": 0.9}, r"compose\.slicing 0\.9: give a share of at most 0\.7500, which"),
                             ({"slicing": -0.1}, r"slicing is -0\.1; give a number at least 0"),
                             ({"multiple": 0}, "multiple is 0; give"),
                             ({"multiple": 33}, r"compose\.multiple 33: give at most the width of the model, 32"),
                             ({"sequences": 17}, r"compose\.sequences 17: there are 16"),
                             ({"batch_sequences": 0}, "batch_sequences is 0; give a number at least 1"),
                             ({"massive": "bypass"}, "massive is 'bypass'; choose one of raw, mask")]:
        with pytest.raises(ValueError, match=message):
            composed(dense, **options)


def test_the_most_that_can_go_is_reached(dense):
    most = 1 - literal(dense.model.config, 8, D) / dense.model.num_parameters()
    assert composed(dense, most).stats["width"] == 8
    with pytest.raises(BlockError, match=f"is {most:.4f} of all parameters"):
        composed(dense, most + 1e-6)


@pytest.mark.parametrize("family, config, message", [
    ("gemma3_text", {}, "slicegpt cannot slice a gemma3_text model: the norms after its parts cannot be moved; "
                        "choose a model of llama, mistral, qwen3, qwen2, smollm3, opt, phi3"),
    ("opt", {"do_layer_norm_before": False}, "slicegpt cannot slice this opt model: its norms follow the sum"),
    ("opt", {"word_embed_proj_dim": 16}, "its embedding is projected or its final norm is missing, as in OPT-350M"),
])
def test_models_that_cannot_be_sliced_are_refused_before_they_are_loaded(tmp_path, family, config, message):
    model = pico.model(family, layers=1)
    for name, value in config.items():
        setattr(model.config, name, value)
    model.config.save_pretrained(tmp_path / "no_weights")
    with pytest.raises(FitError, match=message):
        composed(Dense(family, tmp_path / "no_weights", None, None))


def test_states_that_are_not_finite_are_refused(dense):
    class Broken(NamedTuple):
        sequences: int = 16
        tokens: int = 24
        massive_factor: float = 8.0

        def state(self, number):
            return torch.full((16, 24, D), math.nan)

    with pytest.raises(FitError, match="attention state of layer 0 of the sliced model is not finite"):
        composed(dense._replace(hidden=Broken()), slicing=0.25)


def test_fewer_sequences_and_other_batches(dense):
    some, one = (composed(dense, slicing=0.25, sequences=8, batch_sequences=batch) for batch in (8, 3))
    assert some.stats["tokens"] == 8 * 24
    for name, tensor in some.plan.tensors.items():
        torch.testing.assert_close(one.plan.tensors[name], tensor, atol=1e-3, rtol=1e-3)
    assert [row["part"] for row in some.stats["states"]] == [*["attention", "mlp"] * LAYERS, "final"]
    kept = [row["kept"] for row in some.stats["states"]]
    assert all(0.5 < share <= 1 + 1e-9 for share in kept) and kept[-1] == pytest.approx(1)
    assert any(share < 0.999 for share in itertools.islice(kept, 2 * LAYERS))
