"""States of a block: the split, the tokens that count, and the arithmetic every fit shares."""
import numpy as np
import pytest
import torch

from kdp_core.base.options import OptionError
from kdp_core.states.block import FitError, gram, lift_input, load, relative_error, ridge_solve
from tests.kdp_core import stored


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def states_LSTD():
    """Six states of ten sequences; one token massive in state 2, one in state 3 only."""
    h_LSTD = normal(6, 10, 8, 4)
    h_LSTD[2, 4, 0] = 100
    h_LSTD[3, 5, 6] = 100
    return h_LSTD


@pytest.fixture
def hidden(tmp_path, states_LSTD):
    return stored.write(tmp_path / "hidden.zarr", states_LSTD)


def test_states_of_the_block_and_of_its_ends(hidden, states_LSTD):
    every = load(hidden, (1, 4), massive="raw", heldout=0.2, seed=0)
    ends = load(hidden, (1, 4), massive="raw", heldout=0.2, seed=0, between=False)
    assert torch.equal(every.h_KSTD, states_LSTD[1:5])
    assert torch.equal(ends.h_KSTD, states_LSTD[[1, 4]])
    assert every.keep_ST.all() and every.bypass_above is None


def test_massive_tokens_of_any_state_in_the_block_are_left_out(hidden):
    left_out = {block: (~load(hidden, block, massive="bypass", heldout=0.2, seed=0).keep_ST).nonzero().tolist()
                for block in ((2, 3), (3, 5), (1, 2), (1, 4), (4, 5))}
    assert left_out == {(2, 3): [[4, 0], [5, 6]], (3, 5): [[5, 6]], (1, 2): [[4, 0]], (1, 4): [[4, 0], [5, 6]],
                        (4, 5): []}


def test_fits_that_read_the_ends_only_judge_on_the_same_tokens(hidden):
    every, ends = (load(hidden, (1, 4), massive="bypass", heldout=0.2, seed=0, between=flag) for flag in (True, False))
    assert torch.equal(every.keep_ST, ends.keep_ST) and every.bypass_above == ends.bypass_above
    assert torch.equal(every.heldout, ends.heldout) and torch.equal(every.train, ends.train)
    assert torch.equal(every.tokens(every.heldout)[[0, -1]], ends.tokens(ends.heldout))


def test_bypass_threshold_is_the_mask_of_the_first_state(hidden, states_LSTD):
    found = load(hidden, (2, 4), massive="bypass", heldout=0.2, seed=0)
    norm_ST = states_LSTD[2].norm(dim=-1)
    assert found.bypass_above == pytest.approx(8 * norm_ST.flatten().sort().values[(80 - 1) // 2].item())
    assert torch.equal(norm_ST > found.bypass_above, hidden.massive([2]))


@pytest.mark.parametrize("share, judged", [(0.1, 1), (0.25, 2), (0.5, 5), (0.94, 9)])
def test_split_is_a_partition_by_seed(hidden, share, judged):
    found, again, other = (load(hidden, (1, 2), massive="raw", heldout=share, seed=seed) for seed in (0, 0, 3))
    assert len(found.heldout) == judged
    assert sorted([*found.train.tolist(), *found.heldout.tolist()]) == list(range(10))
    assert found.train.tolist() == sorted(found.train.tolist())
    assert torch.equal(found.heldout, again.heldout) and not torch.equal(found.heldout, other.heldout)
    block = load(hidden, (3, 5), massive="bypass", heldout=share, seed=0)
    assert torch.equal(found.heldout, block.heldout), "all blocks of a model are judged on the same sequences"


def test_tokens_and_positions_go_together(hidden, states_LSTD):
    found = load(hidden, (2, 4), massive="bypass", heldout=0.3, seed=1)
    rows = [(s, t) for s in found.train.tolist() for t in range(8) if (s, t) not in ((4, 0), (5, 6))]
    assert found.tokens(found.train).shape == (3, len(rows), 4)
    for k in range(3):
        expected_ND = torch.stack([states_LSTD[2 + k, s, t] for s, t in rows])
        assert torch.equal(found.tokens(found.train)[k], expected_ND)
    assert found.positions(found.train).tolist() == [t for _, t in rows]
    together = len(found.positions(found.train)) + len(found.positions(found.heldout))
    assert together == found.keep_ST.sum() == 78


@pytest.mark.parametrize("options, message", [
    ({"massive": "mask"}, "massive is 'mask'; choose one of bypass, raw"),
    ({"heldout": 0.0}, "heldout 0.0 of 10 sequences leaves none to fit on or none to judge on"),
    ({"heldout": 0.04}, "heldout 0.04 of 10"), ({"heldout": 1.0}, "heldout 1.0 of 10"),
])
def test_refusals(hidden, options, message):
    with pytest.raises((FitError, OptionError), match=message):
        load(hidden, (1, 2), **{"massive": "raw", "heldout": 0.2, "seed": 0, **options})


def test_lift_input():
    h_ND = normal(5, 4) * torch.tensor([1e-3, 1, 10, 1000, 0])[:, None]
    assert torch.equal(lift_input(h_ND, "raw"), h_ND)
    scaled_ND = lift_input(h_ND, "rms").double().numpy()
    norms_N = np.linalg.norm(h_ND.double().numpy(), axis=1)[:4, None]
    np.testing.assert_allclose(scaled_ND[:4], h_ND[:4].double().numpy() / norms_N * 4 ** 0.5, rtol=1e-5)
    assert (scaled_ND[4] == 0).all()
    torch.testing.assert_close(lift_input(7 * h_ND[:4], "rms"), lift_input(h_ND[:4], "rms"))


def test_relative_error():
    h_ND, guess_ND = normal(50, 4).double() + 3, normal(50, 4, seed=1).double()
    h, guess = h_ND.numpy(), guess_ND.numpy()
    by_hand = sum((guess[i] - h[i]) @ (guess[i] - h[i]) for i in range(50)) / (50 * h.var(axis=0).sum())
    assert relative_error(guess_ND, h_ND) == pytest.approx(by_hand)
    assert relative_error(h_ND, h_ND) == 0
    assert relative_error(h_ND.mean(0).expand(50, 4), h_ND) == pytest.approx(1)
    assert relative_error(2 * guess_ND + 5, 2 * h_ND + 5) == pytest.approx(by_hand)


@pytest.mark.parametrize("ridge", [1e-8, 1e-2, 1.0])
def test_ridge_against_least_squares_of_more_rows(ridge):
    """Ridge is ordinary least squares on data with sqrt(level) I below it."""
    x_NF, y_ND = normal(40, 6).double(), normal(40, 3, seed=1).double()
    level = ridge * np.mean(np.sum(x_NF.numpy() ** 2, axis=0))
    longer = np.vstack([x_NF.numpy(), np.sqrt(level) * np.eye(6)])
    expected_FD, *_ = np.linalg.lstsq(longer, np.vstack([y_ND.numpy(), np.zeros((6, 3))]), rcond=None)
    found_FD = ridge_solve(x_NF.mT @ x_NF, x_NF.mT @ y_ND, ridge)
    assert found_FD.dtype == torch.float64
    np.testing.assert_allclose(found_FD.numpy(), expected_FD, rtol=1e-6, atol=1e-9)


def test_ridge_is_relative_to_the_data():
    x_NF, y_ND = normal(40, 6).double(), normal(40, 3, seed=1).double()
    small_FD = ridge_solve(x_NF.mT @ x_NF, x_NF.mT @ y_ND, 0.1)
    large_FD = ridge_solve(1e6 * x_NF.mT @ x_NF, 1e3 * x_NF.mT @ y_ND, 0.1)
    torch.testing.assert_close(small_FD, 1e3 * large_FD)


@pytest.mark.parametrize("gram_FF", [torch.zeros(3, 3), -torch.eye(3), torch.full((3, 3), torch.nan)])
def test_singular_gram_is_named(gram_FF):
    with pytest.raises(FitError, match=r"Gram matrix is singular with ridge 1e-06; raise the ridge"):
        ridge_solve(gram_FF, torch.ones(3, 2), 1e-6)


def test_gram_is_exact_to_float32_of_the_centred_part():
    generator = torch.Generator().manual_seed(0)
    # features that hardly leave their mean: the case that a plain float32 product gets wrong
    x_NF = 1 + 1e-4 * torch.randn(500, 20, generator=generator)
    y_NG = -2 + 1e-4 * torch.randn(500, 8, generator=generator)
    exact_FG = x_NF.double().T @ y_NG.double()
    assert (gram(x_NF, y_NG) - exact_FG).abs().max() < 1e-9
    assert ((x_NF.T @ y_NG).double() - exact_FG).abs().max() > 1e-6
    assert torch.linalg.eigvalsh(gram(x_NF, x_NF)).min() > 0


def test_states_stay_in_main_memory_without_a_gpu(tmp_path):
    states = load(stored.write(tmp_path / "h.zarr", stored.drift()), (0, 2), massive="raw", heldout=0.2, seed=0)
    assert states.on("cpu") is states
    assert states.positions(states.heldout).tolist() == list(range(24)) * len(states.heldout)
