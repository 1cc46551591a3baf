"""The multiple-choice knapsack: it chooses one level for each part, so that the levels save enough and lose least."""
import numpy as np


def knapsack(losses: list[np.ndarray], saved: list[np.ndarray], budget: int) -> list[int]:
    """Choose a level for each part. Together, the chosen levels save at least `budget` steps, and the sum of their
    losses is minimal.

    losses: for each part, an array with the loss of each level. saved: for each part, an array with the number of steps
    that each level saves; these numbers are whole and in ascending order. If two levels are equally good, the lower
    level is chosen. The last levels of all parts must together save at least `budget` steps.
    """
    # best[b]: least loss of the parts so far if they save at least b steps
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
