"""Comparison of a pruned model's outputs with the dense model's, with and without kept logits."""
import pytest
import torch

from kdp_core.methods import _outputs
from kdp_core.methods._outputs import Compared
from kdp_core.model import distil
from kdp_core.model.distil import Head
from kdp_core.model.passes import Passes
from tests import pico

S, T, LAYERS = 5, 6, 4


@pytest.fixture
def passes():
    return Passes(pico.lively(pico.model("llama", layers=LAYERS)).requires_grad_(False), T)


def states(passes):
    """The states before the first layer, and the last states."""
    ids_ST = torch.randint(2, 384, (S, T), generator=torch.Generator().manual_seed(0))
    h_STD = passes.model.get_input_embeddings()(ids_ST)
    return h_STD, passes.run(h_STD, list(range(LAYERS)))


@torch.no_grad()
@pytest.mark.parametrize("batch", [2, 5])
@pytest.mark.parametrize("own_head", [False, True])
def test_kept_logits_do_not_change_the_divergence(passes, monkeypatch, batch, own_head):
    monkeypatch.setattr(distil, "SLICE", 100)
    monkeypatch.setattr(_outputs, "SLICED_TOKENS", 7)
    h_STD, final_STD = states(passes)
    path, dense = [0, 1, 3], passes.head.linear
    other = torch.nn.Linear(dense.in_features, dense.out_features, bias=False)
    other.weight.data = dense.weight * torch.linspace(0.5, 1, dense.out_features)[:, None]
    head = Head(other.requires_grad_(False)) if own_head else None
    kept = Compared(passes, final_STD, batch)
    monkeypatch.setattr(_outputs, "KEPT_NUMBERS", S * T * 384 - 1)
    again = Compared(passes, final_STD, batch)
    assert kept._kept and not again._kept
    logp, logq = (one(passes.to_head(h)).double().log_softmax(-1)
                  for one, h in ((dense, final_STD), (other if own_head else dense, passes.run(h_STD, path))))
    expected = (logp.exp() * (logp - logq)).sum(-1).mean().item()
    assert expected > 1e-3
    for compared in (kept, kept, again):
        assert compared.divergence(path, h_STD, head) == pytest.approx(expected, rel=1e-4)
    assert abs(kept.divergence(list(range(LAYERS)), h_STD)) < 1e-6
