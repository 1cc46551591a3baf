"""Made-up dictionaries and options that the tests of kdp_residual share."""
import numpy as np
import torch

from kdp_core.methods.kdp_residual.dictionaries import Dictionary, Fit

FIT = Fit("none", 6, 3.0, 1e-2, "inverse_norm", "rms", 8.0, 4, 0)


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def entries_of(dictionary, x_ND):
    """f(V x + c) by NumPy."""
    inner = x_ND @ dictionary.v_RD.double().numpy().T + dictionary.c_R.double().numpy()
    if dictionary.kind == "rff":
        return np.cos(inner)
    if dictionary.kind == "mlp":
        return np.maximum(inner, 0)
    gate, up = np.split(inner, 2, axis=1)
    return gate / (1 + np.exp(-gate)) * up


def made_up(kind, entries=6, width=5, seed=0):
    rows = 2 * entries if kind == "glu" else entries
    activation = "silu" if kind == "glu" else "relu"
    return Dictionary(kind, randn(rows, width, seed=seed), randn(rows, seed=seed + 1), activation)
