"""Similarity against literal sums and closed forms, its invariances, and what massive tokens do to it."""
import numpy as np
import pytest
import torch
import zarr
from torch.utils._python_dispatch import TorchDispatchMode

from kdp_core.base.options import OptionError
from kdp_core.states import hidden
from kdp_core.states.pairwise import squared_distances
from kdp_core.states.similarity import (
    SimilarityError,
    cka,
    hsic_pairs,
    similarity,
    u_centre,
)
from tests.kdp_core import stored


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def hsic_literal(k_BB: np.ndarray, l_BB: np.ndarray) -> float:
    """Song et al. 2012, equation 5, as sums over indices."""
    n = len(k_BB)
    k = [[0.0 if i == j else k_BB[i, j] for j in range(n)] for i in range(n)]
    l = [[0.0 if i == j else l_BB[i, j] for j in range(n)] for i in range(n)]
    trace = sum(k[i][j] * l[j][i] for i in range(n) for j in range(n))
    sums = sum(map(sum, k)) * sum(map(sum, l))
    crossed = sum(k[i][q] * l[q][j] for i in range(n) for q in range(n) for j in range(n))
    # [tr(KL) + 1'K1 1'L1 / ((n - 1)(n - 2)) - 2 / (n - 2) 1'KL1] / (n (n - 3))
    return (trace + sums / ((n - 1) * (n - 2)) - 2 / (n - 2) * crossed) / (n * (n - 3))


def cka_of_features(x_ND: np.ndarray, y_NE: np.ndarray) -> float:
    """Kornblith et al. 2019, biased, in feature space: |Y'X|^2 / (|X'X| |Y'Y|) of centred features."""
    x, y = x_ND - x_ND.mean(0), y_NE - y_NE.mean(0)
    return np.linalg.norm(y.T @ x) ** 2 / (np.linalg.norm(x.T @ x) * np.linalg.norm(y.T @ y))


def layers_of(sequences=64, length=64, width=6, seed=0):
    """Four states: x, a rotation of x, x with noise of its own size, unrelated noise; float32."""
    x_STD = normal(sequences, length, width, seed=seed) * torch.tensor([3.0, 2, 1, 1, 0.5, 0.2]).double()
    rotation_DD = torch.linalg.qr(normal(width, width, seed=1))[0]
    mixed_STD = x_STD + normal(sequences, length, width, seed=2)
    return torch.stack([x_STD, 2.5 * x_STD @ rotation_DD, mixed_STD, normal(sequences, length, width, seed=3)]).float()


@pytest.mark.parametrize("n", [4, 7, 12])
def test_hsic_is_the_literal_sum(n):
    x_LND = normal(3, n, 5)
    gram_LBB = torch.cat([x_LND[:2] @ x_LND[:2].mT, torch.exp(-squared_distances(x_LND[2:], x_LND[2:] @ x_LND[2:].mT))])
    ours_LL = hsic_pairs(gram_LBB)
    for i in range(3):
        for j in range(3):
            literal = hsic_literal(gram_LBB[i].numpy(), gram_LBB[j].numpy())
            assert ours_LL[i, j].item() == pytest.approx(literal, abs=1e-9)


def test_hsic_is_unbiased_where_the_biased_one_is_not():
    draws, n = 4000, 6
    x_RND, y_RND = normal(draws, n, 3), normal(draws, n, 3, seed=1)
    values_R = torch.stack([hsic_pairs(torch.stack([x @ x.mT, y @ y.mT]))[0, 1]
                            for x, y in zip(x_RND, y_RND, strict=True)])
    assert abs(values_R.mean().item()) < 4 * values_R.std().item() / draws ** 0.5
    # HSIC_0 = tr(K H L H) / (n - 1)^2, whose mean for independent x and y is above zero
    centre_BB = torch.eye(n).double() - 1 / n
    biased_R = [((x @ x.mT) @ centre_BB @ (y @ y.mT) @ centre_BB).trace().item() / (n - 1) ** 2
                for x, y in zip(x_RND, y_RND, strict=True)]
    assert np.mean(biased_R) > 10 * np.std(biased_R) / draws ** 0.5


def test_u_centred_rows_sum_to_zero():
    x_LND = normal(2, 9, 4)
    centred_LBB = u_centre(x_LND @ x_LND.mT)
    torch.testing.assert_close(centred_LBB.sum(-1), torch.zeros(2, 9).double(), atol=1e-12, rtol=0)
    torch.testing.assert_close(centred_LBB, centred_LBB.mT)
    assert (centred_LBB.diagonal(dim1=-2, dim2=-1) == 0).all()
    # what every entry of the Gram matrix shares is centred away, and the diagonal does not count
    torch.testing.assert_close(u_centre(x_LND @ x_LND.mT + 7), centred_LBB)
    torch.testing.assert_close(u_centre(x_LND @ x_LND.mT + 7 * torch.eye(9)), centred_LBB)


@pytest.mark.parametrize("batch", [32, 256])
def test_linear_cka_is_that_of_features_on_many_tokens(tmp_path, batch):
    h_LSTD = layers_of()
    found = similarity(stored.write(tmp_path / "h.zarr", h_LSTD), treatment="raw", tokens=4096, batch=batch)
    x_LND = h_LSTD.flatten(1, 2).double().numpy()
    expected_LL = np.array([[cka_of_features(x, y) for y in x_LND] for x in x_LND])
    np.testing.assert_allclose(found.cka_linear_LL.numpy(), expected_LL, atol=0.02)
    assert 0.1 < expected_LL[0, 2] < 0.97, "a pair between the extremes"


def test_rbf_cka_against_the_literal_sum(tmp_path):
    h_LSTD = layers_of(sequences=2, length=12)
    found = similarity(stored.write(tmp_path / "h.zarr", h_LSTD), treatment="raw", tokens=24, batch=24)
    x_LND = h_LSTD.flatten(1, 2).double().numpy()
    grams = []
    for x in x_LND:
        apart_BB = np.array([[np.linalg.norm(a - b) for b in x] for a in x])
        sigma = np.sort(apart_BB[np.triu_indices(24, 1)])[(24 * 23 // 2 - 1) // 2]
        grams.append(np.exp(-apart_BB ** 2 / (2 * sigma ** 2)))
    own = [hsic_literal(k, k) ** 0.5 for k in grams]
    for i in range(4):
        for j in range(i):
            assert found.cka_rbf_LL[i, j].item() == pytest.approx(hsic_literal(grams[i], grams[j]) / own[i] / own[j],
                                                                 abs=1e-9)


def test_minibatches_sum_before_the_quotient(tmp_path):
    h_LSTD = layers_of(sequences=4, length=16)
    hidden_states = stored.write(tmp_path / "h.zarr", h_LSTD)
    found = similarity(hidden_states, treatment="raw", tokens=64, batch=16, seed=5)
    order = torch.randperm(64, generator=torch.Generator().manual_seed(5))
    x_LND = h_LSTD.flatten(1, 2).double()[:, order]
    parts = [hsic_pairs(x_LND[:, at:at + 16] @ x_LND[:, at:at + 16].mT) for at in range(0, 64, 16)]
    torch.testing.assert_close(found.cka_linear_LL, cka(torch.stack(parts).sum(0)))
    assert not torch.allclose(found.cka_linear_LL, torch.stack([cka(part) for part in parts]).mean(0), atol=1e-3)


def test_invariances_and_bounds(tmp_path):
    found = similarity(stored.write(tmp_path / "h.zarr", layers_of()), treatment="raw", tokens=2048, batch=128)
    for matrix_LL in (found.cka_linear_LL, found.cka_rbf_LL, found.cosine_LL):
        torch.testing.assert_close(matrix_LL.diagonal(), torch.ones(4).double())
        torch.testing.assert_close(matrix_LL, matrix_LL.mT)
        assert matrix_LL.abs().max() <= 1 + 1e-9
    torch.testing.assert_close(found.angular_LL.diagonal(), torch.zeros(4).double(), atol=1e-6, rtol=0)
    assert ((found.angular_LL >= 0) & (found.angular_LL <= 1)).all()
    # rotation and one scale for all change nothing for either CKA, and much for the cosine
    for matrix_LL in (found.cka_linear_LL, found.cka_rbf_LL):
        assert matrix_LL[0, 1].item() == pytest.approx(1, abs=1e-5)
        torch.testing.assert_close(matrix_LL[0, 2], matrix_LL[1, 2], atol=1e-5, rtol=0)
        assert matrix_LL[0, 2] > matrix_LL[0, 3] + 0.2 and abs(matrix_LL[0, 3].item()) < 0.05
    assert found.cosine_LL[0, 1] < 0.9


def test_cosine_and_angle_against_numpy(tmp_path):
    h_LSTD = layers_of(sequences=4, length=16)
    found = similarity(stored.write(tmp_path / "h.zarr", h_LSTD), treatment="raw", tokens=64, batch=32)
    x_LND = h_LSTD.flatten(1, 2).double().numpy()
    for i in range(4):
        for j in range(i):
            cos = [a @ b / np.sqrt(a @ a * (b @ b)) for a, b in zip(x_LND[i], x_LND[j], strict=True)]
            assert found.cosine_LL[i, j].item() == pytest.approx(np.mean(cos), abs=1e-9)
            assert found.angular_LL[i, j].item() == pytest.approx(np.mean(np.arccos(cos)) / np.pi, abs=1e-9)
            last = cos[15::16]  # the four sequences of 16 end here
            assert found.angular_last_LL[i, j].item() == pytest.approx(np.mean(np.arccos(last)) / np.pi, abs=1e-9)


def test_what_massive_tokens_do(tmp_path):
    """Two unrelated states that share a few huge tokens: raw CKA reads one, masked and normalised CKA do not."""
    h_LSTD = normal(2, 16, 64, 8).float()
    h_LSTD[:, :, 0] = 3000 * torch.ones(8)
    states = stored.write(tmp_path / "h.zarr", h_LSTD)
    found = {kind: similarity(states, treatment=kind, tokens=1024, batch=128) for kind in ("mask", "normalise", "raw")}
    assert {kind: (one.treatment, one.masked, one.tokens) for kind, one in found.items()} == {
        "mask": ("mask", 16, 896), "normalise": ("normalise", 0, 1024), "raw": ("raw", 0, 1024)}
    value = {kind: one.cka_linear_LL[0, 1].item() for kind, one in found.items()}
    assert value["raw"] > 0.99 and abs(value["mask"]) < 0.1 and abs(value["normalise"]) < 0.3
    # masking is leaving out: the same as if the tokens had never been there
    others = stored.write(tmp_path / "others.zarr", h_LSTD[:, :, 1:])
    without = similarity(others, treatment="raw", tokens=1008, batch=126)
    masked = similarity(states, treatment="mask", tokens=1008, batch=126)
    torch.testing.assert_close(masked.cka_linear_LL, without.cka_linear_LL)
    # the cosine of all tokens is that of the raw treatment, whatever is masked or normalised
    for one in (masked, found["normalise"], found["raw"]):
        torch.testing.assert_close(one.cosine_all_LL, found["raw"].cosine_LL, atol=1e-6, rtol=0)
    assert masked.cosine_LL[0, 1] + 0.01 < masked.cosine_all_LL[0, 1]
    # of a part of the tokens, massive ones have their share: 8 of 512
    part = similarity(states, treatment="mask", tokens=504, batch=126)
    mean = ((504 * part.cosine_LL + 8) / 512)[0, 1]
    assert part.tokens == 504 and part.cosine_all_LL[0, 1].item() == pytest.approx(mean.item())
    # normalising does not touch a cosine
    torch.testing.assert_close(found["normalise"].cosine_LL, found["raw"].cosine_LL, atol=1e-6, rtol=0)


def test_massive_in_any_state_is_left_out_of_all(tmp_path):
    h_LSTD = normal(3, 4, 16, 8).float()
    h_LSTD[0, 0, 0] *= 1000
    h_LSTD[2, 1, 5] *= 1000
    found = similarity(stored.write(tmp_path / "h.zarr", h_LSTD), treatment="mask", tokens=64, batch=31)
    assert (found.masked, found.tokens) == (2, 62)


@pytest.mark.parametrize("batch", [1, 3, 64])
def test_states_are_read_chunk_by_chunk_and_the_chunks_change_nothing(tmp_path, monkeypatch, batch):
    h_LSTD = layers_of()
    h_LSTD[0, ::5, 3] *= 1000
    whole = similarity(stored.write(tmp_path / "whole.zarr", h_LSTD), tokens=512, batch=64)
    # no whole state is read
    monkeypatch.setattr(hidden.HiddenStates, "state", lambda *args: pytest.fail("a whole state was read"))
    found = similarity(stored.write(tmp_path / "small.zarr", h_LSTD, batch=batch), tokens=512, batch=64)
    for one, other in zip(found, whole, strict=True):
        assert torch.equal(one, other) if isinstance(one, torch.Tensor) else one == other


def test_seed_decides_and_nothing_else(tmp_path):
    states = stored.write(tmp_path / "h.zarr", layers_of())
    first, again, other = (similarity(states, tokens=256, batch=64, seed=seed) for seed in (0, 0, 1))
    torch.rand(3)
    for name in ("cosine_LL", "angular_LL", "cka_linear_LL", "cka_rbf_LL"):
        assert torch.equal(getattr(first, name), getattr(again, name))
        assert not torch.equal(getattr(first, name), getattr(other, name))


def test_a_state_without_variance_reads_nan(tmp_path):
    h_LSTD = layers_of(sequences=4, length=16)
    h_LSTD[1] = torch.arange(6) / 7
    found = similarity(stored.write(tmp_path / "h.zarr", h_LSTD), treatment="raw", tokens=64, batch=32)
    for matrix_LL in (found.cka_linear_LL, found.cka_rbf_LL):
        assert matrix_LL[1].isnan().all() and matrix_LL[:, 1].isnan().all()
        assert matrix_LL[0, [0, 2, 3]].isfinite().all()


def test_only_stored_states_are_compared(tmp_path):
    h_LSTD = layers_of()
    stored.write(tmp_path / "late.zarr", h_LSTD[[0, 2]])
    zarr.open_group(tmp_path / "late.zarr").attrs["layers"] = [3, 8]
    found = similarity(hidden.read(tmp_path / "late.zarr"), tokens=512, batch=64)
    whole = similarity(stored.write(tmp_path / "all.zarr", h_LSTD), tokens=512, batch=64)
    assert found.layers == [3, 8]
    torch.testing.assert_close(found.cka_linear_LL[0, 1], whole.cka_linear_LL[0, 2])


class Products(TorchDispatchMode):
    """The kinds of devices on which matrices are multiplied."""

    def __init__(self):
        super().__init__()
        self.on = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.bmm):
            self.on.append(args[0].device.type)
        return function(*args, **kwargs or {})


def test_everything_is_multiplied_on_the_device_and_comes_back(tmp_path):
    h_LSTD = layers_of(sequences=4, length=16)
    h_LSTD[0, 0, 0] *= 1000
    states = stored.write(tmp_path / "h.zarr", h_LSTD)
    with Products() as here:
        similarity(states, tokens=64, batch=16, device="cpu")
    # a tensor on the meta device has no numbers, so the sums cannot come back
    with Products() as there, pytest.raises(NotImplementedError, match="Cannot copy out of meta tensor"):
        similarity(states, tokens=64, batch=16, device="meta")
    # three minibatches, each with the cosines, the inner products and two HSIC
    assert set(here.on) == {"cpu"} and there.on == ["meta"] * 3 * 4


@pytest.mark.parametrize("options, message", [
    ({"tokens": 20, "batch": 32}, r"20 tokens do not fill one minibatch of 32"),
    ({"batch": 100}, r"64 tokens do not fill one minibatch of 100"),
])
def test_too_few_tokens(tmp_path, options, message):
    states = stored.write(tmp_path / "h.zarr", layers_of(sequences=4, length=16))
    with pytest.raises(SimilarityError, match=message):
        similarity(states, **options)


@pytest.mark.parametrize("options, message", [
    ({"treatment": "clip"}, "treatment is 'clip'; choose one of mask, normalise, raw"),
    ({"batch": 3}, "batch is 3; give a number at least 4"), ({"tokens": 0}, "tokens is 0; give a number at least 1")])
def test_values_that_are_not_allowed(tmp_path, options, message):
    states = stored.write(tmp_path / "h.zarr", layers_of(sequences=4, length=16))
    with pytest.raises(OptionError, match=message):
        similarity(states, **options)
