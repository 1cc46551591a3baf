"""Computes Tables 10 and 12 of the KDP paper (Ma et al., ICLR 2026) from nothing but the configurations of its six
models.

Models are built on the meta device: they have shapes but no weights, and nothing is downloaded. "FLOPs" are counted as
in the paper: multiply-adds of the linear layers for 128 tokens, with the output head, without the embedding and the
attention scores (see kdp_core.model.sizes). The tables show our counts, the paper's figures and the differences;
NOTES_10 and NOTE_12 explain the differences. If the number of removed layers is known, our counts agree with most
figures of Table 10 in every digit. The exceptions are:
    KDP's own rows   count the folded block at 2 per multiply-add and without the projection, and the layers at 1. The
                     row of LLaMA-2-7B corresponds to four blocks of two layers, while Table 5 lists five
    ratios           SliceGPT's rows remove 25 % of the width, which is 15 % of the parameters, so the ratios differ
"""
import math
from collections.abc import Iterator, Mapping
from typing import Literal, NamedTuple

import pandas as pd
import torch

from kdp_core.methods import slicegpt
from kdp_core.model.families import decoder_layers
from kdp_core.model.sizes import count_macs, count_params
from kdp_core.model.stand_ins import RffMlp
from kdp_core.results import columns, tables
from kdp_core.results.columns import Column
from kdp_core.study.planner import PUBLISHED

TOKENS = 128
"""Number of tokens for which the paper counts FLOPs."""
FEATURES = 1024
"""2m, appendix B."""
HIDDEN = 2000
"""ASSUME: width of the inverse network of step 2. The paper does not state this width; with 2000 the counts agree with
Table 12's 2.89 G and 3.4 G."""
PAIRS = 5
"""Number of blocks that Table 5 lists for each LLaMA model. Each block has two layers if the paper's notation [17,19]
means layers 17 and 19."""
SLICED = 0.25
"""Share of the hidden width that SliceGPT removes; widths are multiples of 8."""

MODELS: Mapping[str, str] = {
    "LLaMA-2-7B": "meta-llama/Llama-2-7b-hf", "LLaMA-2-13B": "meta-llama/Llama-2-13b-hf",
    "LLaMA-3-8B": "meta-llama/Meta-Llama-3-8B", "LLaMA-3.1-8B": "meta-llama/Llama-3.1-8B",
    "OPT-2.7B": "facebook/opt-2.7b", "OPT-6.7B": "facebook/opt-6.7b"}
"""The names of the paper's models, and the names of the same models on the hub."""


class Printed(NamedTuple):
    """The paper's figures for one model and method: those of its row in Table 10, and its ratio in Table 1."""
    flops_giga: float = math.nan
    change_percent: float = math.nan
    speedup: float = math.nan
    ratio_percent: float = math.nan


TABLE_10: Mapping[tuple[str, str], Printed] = {
    ("LLaMA-2-7B", "dense"): Printed(845.71, ratio_percent=0.0),
    ("LLaMA-2-7B", "SLEB"): Printed(664.38, 27.29, 1.27, 20.1),
    ("LLaMA-2-7B", "ShortGPT"): Printed(612.57, 38.06, 1.38, 27.1),
    ("LLaMA-2-7B", "Streamline"): Printed(586.67, 30.63, 1.44, 27.0),
    ("LLaMA-2-7B", "SliceGPT"): Printed(717.63, 15.14, 1.17, 25.4),
    ("LLaMA-2-7B", "KDP"): Printed(650.06, 23.13, 1.30, 22.8),
    ("LLaMA-2-13B", "dense"): Printed(1645.01, ratio_percent=0.0),
    ("LLaMA-2-13B", "SLEB"): Printed(1320.20, 19.74, 1.24, 19.5),
    ("LLaMA-2-13B", "ShortGPT"): Printed(1239.00, 24.68, 1.33, 24.6),
    ("LLaMA-2-13B", "Streamline"): Printed(1229.76, 25.24, 1.34, 24.6),
    ("LLaMA-2-13B", "SliceGPT"): Printed(1392.89, 15.32, 1.18, 23.6),
    ("LLaMA-2-13B", "KDP"): Printed(1255.99, 23.64, 1.30, 23.4),
    ("LLaMA-3-8B", "SLEB"): Printed(ratio_percent=19.0),
    ("LLaMA-3-8B", "ShortGPT"): Printed(ratio_percent=19.0),
    ("LLaMA-3-8B", "KDP, counted alike"): Printed(ratio_percent=25.8),
}
"""Table 10, with the ratios of Table 1. For all other models, the paper reports no costs."""

REMOVED: Mapping[str, Mapping[str, int]] = {
    "LLaMA-2-7B": {"SLEB": 7, "ShortGPT": 9, "Streamline": 10},
    "LLaMA-2-13B": {"SLEB": 8, "ShortGPT": 10, "Streamline": 10},
    "LLaMA-3-8B": {"SLEB": 7, "ShortGPT": 7},
    # ASSUME: as many of the 32 layers are removed as in the other models with 32 layers
    "LLaMA-3.1-8B": {"SLEB": 7, "Streamline": 10},
    "OPT-2.7B": {"SLEB": 7},
    "OPT-6.7B": {"SLEB": 7},
}
"""Number of layers that each baseline removes, derived from the baseline's FLOPs or ratio; the rows are those of Tables
1, 2 and 6."""
AS_PRINTED: Mapping[str, int] = {"LLaMA-2-7B": 4, "LLaMA-2-13B": 5}
"""Number of folded blocks of two layers for which our count agrees with KDP's FLOPs in Table 10."""

TABLE_12: Mapping[str, Mapping[str, tuple[float, ...]]] = {
    "LLaMA-2-7B": {"block_gmacs": (51.80, 77.71), "block_mparams": (404.77, 607.15), "fold": (2.89, 12.40),
                   "kept_flops": (5.59, 3.73), "kept_params": (3.07, 2.05)},
    "LLaMA-2-13B": {"block_gmacs": (81.20, 121.80), "block_mparams": (634.41, 951.61), "fold": (3.4, 14.83),
                    "kept_flops": (4.19, 2.79), "kept_params": (2.34, 1.56)},
}
"""Table 12 for k = 2 and k = 3. `fold` contains the GFLOPs and the millions of parameters of one folded block, which
are equal for both k."""


# What a model costs ---------------------------------------------------------------------------------------------------

class Size(NamedTuple):
    """Counts of one model, of one of its layers, and of one of its folded blocks."""
    params: int
    macs: int
    """All fields with multiply-adds count one token."""
    layer_params: int
    layer_macs: int
    fold_params: int
    fold_macs: int
    fold_printed: int
    """FLOPs of a folded block as the paper counts them, at 2 per multiply-add, without the projection. Three matrices
    count: the product of the operators A, W1, and W2."""
    sliced_params: int
    """Parameters of the model that SliceGPT slices by SLICED. As in SliceGPT's code, the last layer writes the whole
    width, and the head reads the whole width."""
    sliced_macs: int


def size(model: str) -> Size:
    """The counts of a model of MODELS. The model is built without weights from its published configuration."""
    # imported here, because the import takes seconds
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model(**PUBLISHED[MODELS[model]])
    with torch.device("meta"):
        dense = AutoModelForCausalLM.from_config(config)
        fold = RffMlp(config.hidden_size, FEATURES // 2, HIDDEN, "gelu", "rms")
        sliced = AutoModelForCausalLM.from_config(
            slicegpt.sliced_config(config, slicegpt.cut(config.hidden_size, SLICED, 8), slice_head=False))
    layer = decoder_layers(dense)[0]
    # 2 ((2m)^2 + 2m H + H D) = 2 ((2m)^2 + H (2m + D))
    printed = 2 * (FEATURES ** 2 + HIDDEN * (FEATURES + config.hidden_size))
    return Size(count_params(dense), count_macs(dense), count_params(layer), count_macs(layer), count_params(fold),
                count_macs(fold), printed, count_params(sliced), count_macs(sliced))


# Table 10 -------------------------------------------------------------------------------------------------------------

def table_10() -> pd.DataFrame:
    """One row for each model and method: what is removed, our counts, the paper's figures, and why the figures
    differ."""
    rows = []
    for model in MODELS:
        counts = size(model)
        for method, what, params, macs, note in _variants(model, counts):
            printed = TABLE_10.get((model, method), Printed())
            flops = TOKENS * macs / 1e9
            rows.append({
                "model": model, "method": method, "what": what, "removed_percent": 100 * (1 - params / counts.params),
                "printed_ratio_percent": printed.ratio_percent, "flops_giga": flops,
                "printed_flops_giga": printed.flops_giga, "off_percent": 100 * (printed.flops_giga / flops - 1),
                "reduction_percent": 100 * (1 - macs / counts.macs), "printed_change_percent": printed.change_percent,
                "speedup": counts.macs / macs, "printed_speedup": printed.speedup, "note": note,
                "explanation": " ".join(NOTES_10[letter] for letter in note.split())})
    return pd.DataFrame(rows)


def _variants(model: str, counts: Size) -> Iterator[tuple[str, str, int, int, str]]:
    """For every row of one model: (method, what is removed, parameters, multiply-adds per token, letters of the row's
    notes)."""
    yield "dense", "", counts.params, counts.macs, "a"
    for method, layers in REMOVED[model].items():
        note = "b" if method == "SLEB" and model == "LLaMA-2-7B" else "c" if method == "Streamline" else ""
        if model in AS_PRINTED:
            note += " d" if model == "LLaMA-2-7B" and method != "Streamline" else ""
            note += " e" if model == "LLaMA-2-13B" and method == "Streamline" else ""
        yield (method, f"{layers} layers", counts.params - layers * counts.layer_params,
               counts.macs - layers * counts.layer_macs, note.strip())
    yield "SliceGPT", f"{SLICED:.0%} of the width", counts.sliced_params, counts.sliced_macs, "f"
    if model in AS_PRINTED:
        blocks = AS_PRINTED[model]
        yield ("KDP", f"{2 * blocks} layers, {blocks} folded at 2 each", *_kdp(counts, blocks, counts.fold_printed),
               "g h" if blocks < PAIRS else "g")
    yield "KDP, counted alike", f"{2 * PAIRS} layers, {PAIRS} folded", *_kdp(counts, PAIRS, counts.fold_macs), "i"


def _kdp(counts: Size, blocks: int, fold_macs: int) -> tuple[int, int]:
    return (counts.params - blocks * (2 * counts.layer_params - counts.fold_params),
            counts.macs - blocks * (2 * counts.layer_macs - fold_macs))


NOTES_10 = {
    "a": "FLOPs are multiply-adds, each counted once.",
    "b": "7 layers are 21.0 % of the parameters and 6 are 18.0 %; the listed ratio is neither.",
    "c": "Ten layers out and one trained layer put in is a ratio of 27.0 % (LLaMA-2-7B, as listed) or 21.9 % (13B); "
         "the FLOPs leave the layer put in out.",
    "d": "The listed change is the speed-up less one; the other rows list the reduction.",
    "e": "No whole number of layers gives the listed FLOPs; ten are nearest.",
    "f": "A quarter of the width is 15 % of LLaMA's parameters, listed as 25.4 and 23.6 %: not at a matched ratio.",
    "g": "A folded block counts 2 a multiply-add, as in Table 12, without its projection; the layers it replaces "
         "count 1.",
    "h": "The listed FLOPs are those of four blocks of two layers, 23.3 % of the parameters (listed: 22.8 %); Table 5 "
         "lists five blocks for this ratio, which would be 601.1 G and 29 %.",
    "i": "Five blocks of two layers as in Table 5, every multiply-add counted once, the projection and phases in, "
         "the operators multiplied into the inverse network.",
}


# Table 12 -------------------------------------------------------------------------------------------------------------

def table_12() -> pd.DataFrame:
    """One row for each model and k. A row compares k layers with one folded block, in our counts and in the paper's
    figures."""
    rows = []
    for model in MODELS:
        counts, printed = size(model), TABLE_12.get(model)
        for place, k in enumerate((2, 3)):
            block, fold = k * counts.layer_macs, counts.fold_macs
            listed = {name: values[place] if name != "fold" else values for name, values in printed.items()} \
                if printed else {}
            fold_flops, fold_params = listed.get("fold", (math.nan, math.nan))
            rows.append({
                "model": model, "k": k, "block_giga": TOKENS * block / 1e9,
                "printed_block_giga": listed.get("block_gmacs", math.nan), "fold_giga": TOKENS * fold / 1e9,
                "fold_giga_paper_count": TOKENS * counts.fold_printed / 1e9, "printed_fold_giga": fold_flops,
                "kept_percent": 100 * fold / block, "printed_kept_percent": listed.get("kept_flops", math.nan),
                "block_millions": k * counts.layer_params / 1e6,
                "printed_block_millions": listed.get("block_mparams", math.nan),
                "fold_millions": counts.fold_params / 1e6, "printed_fold_millions": fold_params,
                "kept_params_percent": 100 * counts.fold_params / (k * counts.layer_params),
                "printed_kept_params_percent": listed.get("kept_params", math.nan)})
    return pd.DataFrame(rows)


NOTE_12 = (
    "The folded block's FLOPs are listed at 2 a multiply-add (2 x 128 x (1024 x 1024 + 2000 x (1024 + D))), without "
    "the projection to 512 frequencies, and those of the Transformer block beside it at 1: counted alike, as in the "
    "column Folded, a folded block costs less than listed. The layers' listed FLOPs are cut, not rounded; the listed "
    "shares kept, and Table 10, hold for folded blocks of 2.897 and 3.399 G. The inverse network's width is not "
    "printed; 2,000 fits the FLOPs. With it no single rank of the kernel's covariance gives both listed numbers of "
    "parameters by appendix I (269 on 7B, 289 on 13B); ours count frequencies as they are stored, D x 512, and the "
    "operators multiplied into the first matrix.")


# For print ------------------------------------------------------------------------------------------------------------

COLUMNS_10 = {
    "method": Column("Method", "", ""), "what": Column("Out", "", ""),
    "removed_percent": Column("Removed", "%", "", 1), "printed_ratio_percent": Column("listed", "%", "", 1),
    "flops_giga": Column("FLOPs", "G", "", 2), "printed_flops_giga": Column("listed", "G", "", 2),
    "off_percent": Column("off", "%", "", 2), "reduction_percent": Column("Reduction", "%", "", 2),
    "printed_change_percent": Column("listed change", "%", "", 2), "speedup": Column("Speed-up", "x", "", 2),
    "printed_speedup": Column("listed", "x", "", 2), "note": Column("Note", "", ""),
}
COLUMNS_12 = {
    "k": Column("k", "", "", 0), "block_giga": Column("Layers", "G", "", 2),
    "printed_block_giga": Column("listed", "G", "", 2), "fold_giga": Column("Folded", "G", "", 2),
    "fold_giga_paper_count": Column("by the paper's count", "G", "", 2),
    "printed_fold_giga": Column("listed", "G", "", 2), "kept_percent": Column("Kept", "%", "", 2),
    "printed_kept_percent": Column("listed", "%", "", 2), "block_millions": Column("Layers", "M", "", 2),
    "printed_block_millions": Column("listed", "M", "", 2), "fold_millions": Column("Folded", "M", "", 2),
    "printed_fold_millions": Column("listed", "M", "", 2), "kept_params_percent": Column("Kept", "%", "", 2),
    "printed_kept_params_percent": Column("listed", "%", "", 2),
}


def render(frame: pd.DataFrame, number: Literal[10, 12], format: Literal["csv", "md", "tex"]) -> str:
    """Table 10 or Table 12 as text. The CSV text also contains the explanations, and all figures in full precision."""
    if format == "csv":
        return frame.to_csv(index=False, lineterminator="\n")
    known = COLUMNS_10 if number == 10 else COLUMNS_12
    caption = (f"Multiply-adds of the linear layers for {TOKENS} tokens, from configurations alone; listed: the KDP "
               f"paper's Table 10, ratios Table 1." if number == 10 else
               f"k layers beside one folded block (2m = {FEATURES}, inverse network {HIDDEN} wide): multiply-adds for "
               f"{TOKENS} tokens and parameters; listed: the KDP paper's Table 12.")
    note = " ".join(f"{letter}: {text}" for letter, text in NOTES_10.items()) if number == 10 else NOTE_12
    head = [tables.escape(text, format) for text in ["Model", *map(columns.heading, known.values())]]
    body, above = [], ""
    for row in frame.to_dict("records"):
        cells = ["" if row["model"] == above else row["model"],
                 *(columns.number(column, row[name]) for name, column in known.items())]
        body.append(((row["model"],), [tables.escape(cell, format) for cell in cells]))
        above = row["model"]
    keys = 3 if number == 10 else 1
    return tables.grid(head, body, format, keys=keys, caption=caption, label=f"tab:paper-{number}", note=note,
                       wide=True)

