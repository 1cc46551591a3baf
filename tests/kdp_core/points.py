"""Made-up results for the tests of tables, figures and report: every number chosen by hand."""
import torch

from kdp_core.base.measurements import Efficiency, Score, Scores
from kdp_core.base.records import Inverse, KernelMap, PrunedFacts, Similarity
from kdp_core.results.columns import Point


def scores(ppl: float, acc: float, acc_norm: float, *, stderr: float | None = 0.01) -> Scores:
    """One perplexity task, one task with acc alone and one with acc and acc_norm."""
    made = [Score("text", "ppl", ppl, None if stderr is None else ppl * stderr, 39, False, "ppl"),
            Score("lastword", "perplexity", 44.0, 5.0, 64, False, "ppl"),
            Score("lastword", "acc", acc, stderr, 64, True, "share"),
            Score("continuation", "acc", 0.11, stderr, 48, True, "share"),
            Score("continuation", "acc_norm", acc_norm, stderr, 48, True, "share")]
    return Scores(made, 1.0, {})


def efficiency(share: float = 0.0) -> Efficiency:
    kept, dense = round(1e8 * (1 - share)), 10**8
    return Efficiency(kept, dense, kept * 128, dense * 128, 128, 100 * (1 - share), 100.0, 10 * (1 - share), 10.0,
                      1 / (1 - share), 1 / (1 - share), 500.0, "peak resident", "cpu", 1, 5)


def dense(model: str = "tiny", **known) -> Point:
    measured = known.get("scores", scores(20.0, 0.5, 0.7))
    return Point(model, "", "dense", 0.0, 0, None, None, measured, efficiency(), None)


def pruned(method: str, measured: Scores, *, model: str = "tiny", ratio: float = 0.2, k_max: int = 3,
           calib: str = "news", share: float = 0.19, blocks=((5, 8), (8, 11))) -> Point:
    blocks = [tuple(block) for block in blocks]
    facts = PrunedFacts(method, 12, sum(stop - start - 1 for start, stop in blocks), 10**8, round(1e8 * (1 - share)),
                        10**6, share, blocks, [], 0)
    return Point(model, calib, method, ratio, k_max, facts, None, measured, efficiency(share), 12.5)


def grid() -> list[Point]:
    """One model, two ratios, three methods: kdp clearly first at 20 %, not told from remove at 40 %, lossy below it."""
    return [dense(),
            pruned("kdp", scores(25.0, 0.45, 0.65)),
            pruned("remove", scores(40.0, 0.3, 0.5), share=0.21),
            pruned("lossy", scores(80.0, 0.1, 0.3), share=0.2),
            pruned("kdp", scores(50.0, 0.30, 0.50), ratio=0.4, share=0.38, blocks=((2, 5), (5, 8))),
            pruned("remove", scores(50.2, 0.295, 0.50), ratio=0.4, share=0.41),
            pruned("lossy", scores(300.0, 0.05, 0.25), ratio=0.4, share=0.4)]


def similarity(layers: int = 7) -> Similarity:
    place_L = torch.arange(layers, dtype=torch.float32)
    cosine_LL = torch.exp(-(place_L[:, None] - place_L).abs() / 5)
    return Similarity(list(range(layers)), cosine_LL, *[torch.arccos(cosine_LL.clamp(-1, 1)) / torch.pi] * 2,
                      cosine_LL.sqrt(), cosine_LL.pow(0.25), cosine_LL.pow(0.9), "mask", 988, 12)


def kernel(start: int = 5, stop: int = 8, epochs: int = 4) -> KernelMap:
    curve = [{"epoch": e, "seconds": 0.1, "lr": 0.01, "loss": 1 / (e + 1), "mse": 0.5 / (e + 1),
              "cos": 1 - 0.1 / (e + 1), "heldout_loss": 1.2 / (e + 1), "heldout_mse": 0.6 / (e + 1),
              "heldout_cos": 0.9 - 0.1 / (e + 1),
              "phi_variance": 0.4, "phi_norm": 1 + 0.1 * e, "operator_norm": [2.0 - 0.1 * e] * (stop - start)}
             for e in range(epochs)]
    empty = torch.zeros(1)
    return KernelMap((start, stop), empty, empty, empty, empty, lift_input="rms", bypass_above=None, curve=curve,
                     stats={"heldout_cos": 0.875, "ridge": 1e-3})


def inverse(start: int = 5, stop: int = 8, epochs: int = 3) -> Inverse:
    curve = [{"epoch": e, "seconds": 0.1, "loss": 2 / (e + 1), "heldout_loss": 3 / (e + 1), "heldout_error": 0.25}
             for e in range(epochs)]
    empty = torch.zeros(1)
    return Inverse((start, stop), empty, empty, empty, empty, 1.0, "gelu", curve, {"name": "not a number"})
