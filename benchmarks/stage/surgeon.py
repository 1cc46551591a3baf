"""Compares a removal by the optimal brain surgeon with a lower limit: two rank-one updates in place.

`ziplm`, `slimgpt` and `kdp_narrow` remove units of a writer one after the other. A removal computes the losses of all
units, and changes the matrix of the writer and the inverse of the Gram matrix. Each of the two changes is at least a
rank-one update of the matrix. The second comparison is the same change by a second matrix of this size, which is then
subtracted.
"""
import torch

from kdp_core.methods.heads_channels import obs
from stage.setup import Setup
from stage.timing import Row, in_turns

REMOVALS = 16
"""Removals in a turn."""


def measure(setup: Setup) -> list[Row]:
    """Measure removals of channels from a made-up writer with the sizes of an MLP of SmolLM2-135M."""
    channels, width = setup.size(1536, 48), setup.size(576, 16)
    generator = torch.Generator().manual_seed(0)
    x_NC, w_DC = (torch.randn(*shape, generator=generator, dtype=torch.float64)
                  for shape in ((2 * channels, channels), (width, channels)))
    inverse_CC, _ = obs.inverse(x_NC.T @ x_NC, 0.01)
    columns = torch.arange(REMOVALS)

    def removals() -> None:
        w, inverse = w_DC.clone(), inverse_CC.clone()
        for column in columns.split(1):
            obs.losses(w, inverse, channels)
            obs.remove(w, inverse, column)

    def updates() -> None:
        w, inverse = w_DC.clone(), inverse_CC.clone()
        for column in columns:
            row_C = inverse[column] / inverse[column, column]
            w.addr_(w[:, column].clone(), row_C, alpha=-1)
            inverse.addr_(inverse[:, column].clone(), row_C, alpha=-1)

    def subtracted() -> None:
        w, inverse = w_DC.clone(), inverse_CC.clone()
        for column in columns.split(1):
            row_1C = inverse[column] / inverse[column, column]
            w.sub_(w[:, column] @ row_1C)
            inverse.sub_(inverse[:, column] @ row_1C)

    times = in_turns({"removals": removals, "updates": updates, "subtracted": subtracted}, setup.repeats)
    name = f"{REMOVALS} of {channels} channels removed one by one"
    return [times.row(name, "removals", "updates", against="rank-one updates in place"),
            times.row(name, "removals", "subtracted", against="updates by a second matrix")]
