"""Agreement of searches, and the claims, on rows whose answers are known."""
import pytest

from kdp_core.study.objectives import claims, interval, jaccard, pairs, spearman


def row(objective, strategy, draw, removed, nats=1.0, accuracy=0.5, single=None):
    return {"objective": objective, "strategy": strategy, "draw": draw, "removed": removed, "heldout_nats": nats,
            "heldout_accuracy": accuracy, "single": single or {"1": 0.1, "2": 0.2, "3": 0.3}}


def test_jaccard_is_the_share_in_common():
    assert jaccard([1, 2, 3], [2, 3, 4]) == 0.5 and jaccard([1], [2]) == 0.0 and jaccard([], []) == 1.0


def test_spearman_reads_ranks_of_common_layers():
    assert spearman({"1": 1, "2": 5, "3": 9}, {"1": 10, "2": 11, "3": 40, "4": 0}) == pytest.approx(1)
    assert spearman({"1": 1, "2": 5, "3": 9}, {"1": 3, "2": 2, "3": 1}) == pytest.approx(-1)
    assert spearman({"1": 1, "2": 2}, {"1": 1, "2": 2}) is None, "two values have no rank correlation worth the name"
    assert spearman({"1": 1, "2": 1, "3": 1}, {"1": 1, "2": 2, "3": 3}) is None, "equal values have no ranks"


def test_pairs_differ_in_one_thing_alone():
    rows = [row("kl", "greedy", 0, [1, 2]), row("loss", "greedy", 0, [2, 3]), row("kl", "beam", 0, [1, 2]),
            row("kl", "greedy", 1, [1, 4])]
    found = pairs(rows)
    assert sorted(found["varies"]) == ["draw", "objective", "strategy"]
    by = found.set_index("varies")["jaccard"]
    assert by.to_dict() == pytest.approx({"objective": 1 / 3, "strategy": 1.0, "draw": 1 / 3})


def test_an_interval_is_students():
    # mean 2, standard error 1 / sqrt 3, t(0.975, 2) = 4.3027
    assert interval([1.0, 2.0, 3.0]) == pytest.approx((2.0, 2 - 4.3027 / 3 ** 0.5, 2 + 4.3027 / 3 ** 0.5), rel=1e-4)
    assert interval([1.0]) is None


def grid(objective_sets, strategy_nats):
    """Three draws, two objectives and two searches; the sets depend on the objective alone, the loss on the search."""
    return [row(objective, strategy, draw, removed, nats + 0.001 * draw + 0.01 * place, 0.5 - place / 10)
            for draw in range(3) for place, (objective, removed) in enumerate(objective_sets.items())
            for strategy, nats in strategy_nats.items()]


def told(rows):
    return {claim.split(":")[0]: word for claim, word in claims(rows).set_index("claim")["told"].items()}


def test_claims_hold_where_the_objective_decides():
    found = told(grid({"kl": [1, 2, 3], "margin": [4, 5, 6]}, {"one_shot": 1.0, "evolution": 1.2}))
    assert found["objectives choose different layers"] == "holds"
    assert found["searches agree more than objectives"] == "holds"
    assert found["a longer search is not worth it"] == "holds"


def test_claims_do_not_hold_where_it_does_not():
    rows = grid({"kl": [1, 2, 3], "margin": [1, 2, 3]}, {"one_shot": 1.2, "evolution": 1.0})
    # each search and each draw has layers of its own
    rows = [{**one, "removed": [one["draw"], 10 + (one["strategy"] == "evolution")]} for one in rows]
    found = told(rows)
    assert found["objectives choose different layers"] == "does not hold"
    assert found["searches agree more than objectives"] == "does not hold"
    assert found["a longer search is not worth it"] == "does not hold"


def test_one_draw_tells_nothing():
    rows = [one for one in grid({"kl": [1, 2], "loss": [3, 4]}, {"one_shot": 1.0, "tpe": 1.1}) if one["draw"] == 0]
    found = claims(rows)
    assert set(found["told"]) == {"cannot be told here"} and found["low"].isna().all()
    assert found["mean"].notna().sum() == 3, "no second draw, so no number for the first claim"


def test_ranks_by_perplexity_and_accuracy():
    rows = [row(objective, "one_shot", draw, [1], nats, accuracy) for draw in range(2)
            for objective, nats, accuracy in (("kl", 1.0, 0.9), ("loss", 2.0, 0.8), ("margin", 3.0, 0.7))]
    assert told(rows)["perplexity and accuracy rank models differently"] == "does not hold"
    frame = claims(rows).set_index("claim")
    assert frame.loc[next(claim for claim in frame.index if claim.startswith("perplexity")), "mean"] == -0.5
