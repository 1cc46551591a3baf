"""The multiple-choice knapsack: one level of each part, so that enough is saved and as little as possible is lost."""
import numpy as np


def knapsack(losses: list[np.ndarray], saved: list[np.ndarray], budget: int) -> list[int]:
    """The level of each part so that the saved steps sum to `budget` at least and the losses to as little as possible.

    losses, saved: for each part an array over its levels; `saved` holds whole steps, ascending.
    Ties take the lower level. All last levels together must reach the budget.
    """
    # best[b]: least loss of the parts so far that save b steps at least
    best = np.full(budget + 1, np.inf)
    best[0] = 0.0
    table, steps = [], np.arange(budget + 1)
    for loss, save in zip(losses, saved, strict=True):
        tried = np.stack([best[np.maximum(steps - step, 0)] + price for price, step in zip(loss, save, strict=True)])
        table.append(tried.argmin(0))
        best = tried.min(0)
    levels, at = [], budget
    for choice, save in zip(reversed(table), reversed(saved), strict=True):
        levels.append(int(choice[at]))
        at = max(at - int(save[levels[-1]]), 0)
    return levels[::-1]
