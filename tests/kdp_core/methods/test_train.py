"""What the trainings of the methods share: the learning rate beside transformers' own, updates, kept weights."""
import itertools
import math

import pytest
import torch
from torch import nn
from transformers import get_cosine_schedule_with_warmup

from kdp_core.methods._train import TrainingFailed, copies, cosine, descend, restore


def theirs(updates, warmup):
    """The shares of the peak that transformers' schedule gives."""
    optimiser = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
    schedule = get_cosine_schedule_with_warmup(optimiser, warmup, updates)
    rates = []
    for _ in range(updates):
        rates.append(schedule.get_last_lr()[0])
        optimiser.step()
        schedule.step()
    return rates


def test_without_warmup_the_rate_is_that_of_transformers():
    assert [cosine(update, 50) for update in range(50)] == pytest.approx(theirs(50, 0), abs=1e-12)


def test_after_the_warmup_the_rate_is_that_of_transformers_and_the_rise_starts_one_update_ahead():
    """Theirs begins at a rate of zero, so that the first update changes nothing; ours begins at 1 / warmup."""
    ours, other = [cosine(update, 50, warmup=10) for update in range(50)], theirs(50, 10)
    assert ours[10:] == pytest.approx(other[10:], abs=1e-12)
    assert other[0] == 0 and ours[:9] == pytest.approx(other[1:10], abs=1e-12) and ours[9] == 1


def test_the_rate_rises_then_falls_to_nothing():
    rates = [cosine(update, 100, warmup=10) for update in range(100)]
    assert rates[0] == pytest.approx(0.1) and rates[9] == rates[10] == 1.0
    assert all(one > other for one, other in itertools.pairwise(rates[10:])) and 0 < rates[-1] < 0.001
    assert rates[55] == pytest.approx(0.5)
    assert cosine(0, 1) == 1.0


def test_at_once_the_cosine_multiplies_the_rise():
    rates = [cosine(update, 100, warmup=8, at_once=True) for update in range(101)]
    assert rates == pytest.approx([min(1, (t + 1) / 8) * (1 + math.cos(math.pi * t / 100)) / 2 for t in range(101)])
    assert rates[0] == pytest.approx(1 / 8) and rates[100] == pytest.approx(0)
    peak = rates.index(max(rates))
    assert peak == 7 and 0.95 < rates[peak] < 1


def test_an_update_goes_against_the_gradient_and_no_further_than_the_clip():
    weight = nn.Parameter(torch.tensor([3.0, 4.0]))
    optimiser = torch.optim.SGD([weight], lr=1.0)
    descend(weight.square().sum() / 2, optimiser, training="made", remedy="none", clip=1.0)
    torch.testing.assert_close(weight.detach(), torch.tensor([2.4, 3.2]))
    descend(weight.square().sum() / 2, optimiser, training="made", remedy="none")
    torch.testing.assert_close(weight.detach(), torch.zeros(2))


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_loss_that_is_no_number_is_refused_and_changes_nothing(value):
    weight = nn.Parameter(torch.ones(2))
    optimiser = torch.optim.SGD([weight], lr=1.0)
    with pytest.raises(TrainingFailed, match=f"^step 9: the loss is {value}; lower the rate$"):
        descend(weight.sum() * value, optimiser, training="step 9", remedy="lower the rate")
    assert torch.equal(weight.detach(), torch.ones(2))


def test_copies_are_restored():
    weights = [nn.Parameter(torch.randn(3)), nn.Parameter(torch.randn(2, 2))]
    kept = copies(weights)
    with torch.no_grad():
        for weight in weights:
            weight.mul_(5)
    assert not torch.equal(weights[0], kept[0])
    restore(weights, kept)
    assert all(torch.equal(weight, value) for weight, value in zip(weights, kept, strict=True))
