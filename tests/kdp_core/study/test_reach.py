"""What a configuration and the facts of a model refuse is refused by every run, with the same sentence, and no more."""
import pytest
import torch
from transformers import AutoConfig, LlamaConfig

from kdp_core.base.records import ModelFacts, Search, Similarity
from kdp_core.methods import METHODS
from kdp_core.methods._select import BlockError, in_order
from kdp_core.model import checkpoints
from kdp_core.study import reach
from kdp_core.study.reach import Case, refusal
from tests import pico

LAYERS = 30
FACTS = ModelFacts("llama", LAYERS, 576, 49152, 134_515_008, [3_540_096] * LAYERS, 0, "made", "")
"""Of SmolLM2-135M."""


@pytest.fixture(scope="module")
def smollm2(tmp_path_factory):
    """A folder with nothing but the configuration of SmolLM2-135M."""
    folder = tmp_path_factory.mktemp("smollm2")
    LlamaConfig(vocab_size=49152, hidden_size=576, intermediate_size=1536, num_hidden_layers=LAYERS,
                num_attention_heads=9, num_key_value_heads=3, tie_word_embeddings=True).save_pretrained(folder)
    assert checkpoints.facts(checkpoints.on_meta(checkpoints.config_of(folder)), source="made", sha256="")[:6] == \
        FACTS[:6]
    return folder


@pytest.fixture(scope="module")
def refused(smollm2):
    """The refusal of a point of SmolLM2-135M."""
    def ask(name, ratio, k_max=3, sequences=128, length=128, states=None, finetune=None, treatment="mask", **options):
        case = Case(FACTS, smollm2, sequences, length, states, treatment)
        return refusal(name, case, ratio=ratio, k_max=k_max, options=options, finetune=finetune)

    return ask


def test_a_search_that_orders_too_few_layers_is_refused_before_it_runs(refused):
    said = refused("kdp_residual", 0.25, search={"largest": 0.26})
    assert "ratio 0.25: the 8 layers that the search ordered remove at most 0." in said and "search.largest" in said
    assert refused("kdp_residual", 0.25) == "" and refused("kdp_residual", 0.1, search={"largest": 0.26}) == ""
    assert "remove at most" in refused("sleb", 0.5, search={"largest": 0.1})
    assert "remove at most" in refused("shortened_ppl", 0.7, search={"keep_first": 10, "keep_last": 10})


def test_runs_of_removed_layers_are_as_long_as_k_max_lets_them(refused):
    # every second of the 24 layers that may be removed: 12 layers
    assert "the 12 layers" in refused("kdp_residual", 0.7, k_max=2, search={"largest": 0.99})


@pytest.mark.parametrize("name, options, words", [
    ("kdp", {}, "ratio 0.9 is too high: the blocks of k_max 3"),
    ("angular", {}, "ratio 0.9 is too high"),
    ("flap", {}, "all decoder layers together hold"),
    ("kdp_narrow", {}, "all decoder layers together hold"),
    ("kdp", {"block": {"given": [[28, 31]]}}, "0 <= start < stop <= 30"),
])
def test_a_ratio_or_a_block_out_of_reach_is_refused_in_the_words_of_the_method(refused, name, options, words):
    assert words in refused(name, 0.9, **options)


@pytest.mark.parametrize("name, ratio, options, words", [
    ("attn_drop", 0.25, {}, "all that attn_drop can remove is 0.1974"),
    ("mlp_drop", 0.7, {}, "all that mlp_drop can remove is 0.5921"),
    ("fragility_parts", 0.25, {"parts": ["attention"]}, "all that fragility_parts can remove is 0.1974"),
    ("flap", 0.78, {}, "all that flap can remove is"),
    ("ziplm", 0.78, {}, "all that ziplm can remove is"),
    ("slimgpt", 0.65, {}, "of the last layer's heads and channels"),
    ("llm_pruner", 0.7, {"keep_first": 10}, "all that llm_pruner can remove from 18 layers is"),
    ("llm_pruner", 0.1, {"keep_first": 29, "keep_last": 1}, "leave none to prune"),
    ("slicegpt", 0.1, {"multiple": 577}, "give at most the width of the model, 576"),
    ("slicegpt", 0.1, {"slicing": 0.999}, "give a share of at most 0.9861"),
    ("wanda", 0.7893, {}, "zeros do not fit into the linear modules"),
    ("sparsegpt", 0.1, {"pattern": "2:4", "block_size": 6}, "give a multiple of 4"),
    ("laco", 0.1, {"highest": 30}, "the model has layers 0 to 29"),
    ("laco", 0.5, {"lowest": 20}, "layers are to be removed, but these options remove 1 to"),
    ("layer_search", 0.25, {"budget": 30}, "judging every single removal takes"),
    ("layer_search", 0.25, {"keep_first": 20, "keep_last": 5}, "allow only 5"),
    ("layer_search", 0.25, {"objective": "margin", "choices": 17}, "the ends of only 16 sequences"),
    ("layer_search", 0.25, {"objective": "margin", "items": "no/such.jsonl"}, "compose.items no/such.jsonl cannot be"),
    ("replaceme_lstsq", 0.25, {"ridges": []}, "compose.ridges is []"),
    ("streamline", 0.25, {"lr": 1e-5}, "give a min_lr of at most lr"),
])
def test_what_compose_checks_is_refused_before_any_job(refused, name, ratio, options, words):
    assert words in refused(name, ratio, compose=options)


@pytest.mark.parametrize("name, sequences, options, words", [
    ("kdp_residual", 16, {}, "search.judge_sequences 16 of 16 sequences leaves none to fit on"),
    ("kdp_narrow", 8, {}, "search.judge_sequences 8 of 8 sequences leave none to fit on"),
    ("kdp", 128, {"kernel": {"heldout": 0.001}}, "heldout 0.001 of 128 sequences leaves none to fit on"),
    ("linear", 4, {"fit": {"heldout": 0.1}}, "heldout 0.1 of 4 sequences leaves none to fit on or none to judge on"),
    ("linear_prefix", 1, {}, "compose.heldout 0.1 of 1 sequences leaves none to fit on or none to judge on"),
    ("kdp_residual", 3, {"search": {"order": "cka"}, "compose": {"dictionary": "rff_learned"}},
     "rff_learned needs 3 sequences to fit on, and there are 2"),
    ("streamline", 1, {}, "compose.heldout 0.1 of 1 sequences"),
    ("replaceme_cosine", 1, {}, "compose.heldout 0.1 of 1 sequences"),
    ("laco", 16, {"compose": {"sequences": 16}}, "compose.sequences 16 of 16 leaves none to judge the result"),
    *[(name, 16, {"compose": {"sequences": 17}}, "compose.sequences 17")
      for name in ("wanda", "sparsegpt", "flap", "slimgpt", "ziplm", "slicegpt", "joint_drop")],
    ("layer_search", 16, {"compose": {"draw": 1}}, "compose.draw 1 of 16 sequences needs 32 calibration sequences"),
    *[("layer_search", 4, {"compose": {"sequences": 4, "stand_in": kind}}, "heldout 0.1 of 4 sequences leaves none")
      for kind in ("affine", "residual")],
    ("fragility", 8, {}, "and there are 8"),
])
def test_too_few_sequences_are_refused(refused, name, sequences, options, words):
    # LLM-Drop's joint_drop and the others take their sequences from those that are stored
    assert words in refused(name, 0.2, sequences=sequences, **options)


@pytest.mark.parametrize("name, words", [
    ("sleb", "no next token"), ("shortened_taylor", "no next token"), ("llm_pruner", "no next token"),
    ("fragility_parts", "no next token"),
])
def test_sequences_of_one_token_are_refused(refused, name, words):
    assert words in refused(name, 0.1, length=1)
    assert "positions is 16" in refused("fragility", 0.1, length=16)


def test_more_judges_than_sequences_are_no_fault_where_all_are_taken(refused):
    assert refused("ziplm", 0.2, sequences=8, compose={"judge_sequences": 16}) == ""
    assert refused("kdp_residual", 0.2, sequences=16, search={"order": "cka"}) == ""


@pytest.mark.parametrize("name, words", [
    ("kdp", "similarity lacks state"), ("lorp", "set hidden.layers to all"), ("shortgpt", "state 1 is not stored"),
    ("kdp_residual", "lacks states"), ("kdp_narrow", "lacks states"), ("joint_drop", "set hidden.layers"),
])
def test_states_that_will_not_be_stored_are_refused(refused, name, words):
    assert words in refused(name, 0.2, states=[0, 10, 20]) and refused(name, 0.15) == ""
    assert "the model has states 0 to 30" in refused(name, 0.15, states=[0, 31])


def test_a_rank_beyond_the_width_is_refused(refused):
    assert "finetune.rank is 577, above the width of the states, 576" in refused("remove", 0.2, finetune={"rank": 577})
    assert "no next token to predict" in refused("remove", 0.2, length=1, finetune={})
    assert refused("remove", 0.2, finetune={"rank": 576}) == ""
    assert "would fill the weights that this method sets to zero" in refused("wanda", 0.2,
                                                                             finetune={"targets": "linear"})
    assert refused("wanda", 0.2, finetune={}) == "" == refused("remove", 0.2, finetune={"targets": "linear"})


def test_cosines_with_massive_tokens_are_refused_where_the_method_needs_them_masked(refused):
    assert "set it to mask" in refused("lorp_masked", 0.2, treatment="raw")


def test_a_family_is_refused_by_name(smollm2):
    case = Case(FACTS._replace(family="gemma2"), smollm2, 128, 128)
    assert "cannot prune a gemma2 model" in refusal("slicegpt", case, ratio=0.1, k_max=3, options={})
    unknown = Case(FACTS._replace(family="made_up"), smollm2, 128, 128)
    assert refusal("slicegpt", unknown, ratio=0.1, k_max=3, options={}) == ""


# No more than that ----------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("family", pico.EVERY)
def test_what_the_battery_runs_is_not_refused_and_every_part_comes_to_its_data(tmp_path, family):
    """A part that ended before it read anything, or that failed on what is not there, would tell nothing."""
    pico.model(family).config.save_pretrained(tmp_path)
    config = AutoConfig.from_pretrained(tmp_path)
    case = Case(checkpoints.facts(checkpoints.on_meta(config), source="", sha256=""), tmp_path, 40, 24)
    hidden, tokens = reach._blank(case), reach._tokens(case)
    for name, method in METHODS.items():
        if method.refuses(pico.families.FAMILIES[family]):
            continue
        options = method.example
        assert refusal(name, case, ratio=0.2, k_max=3, options=options) == "", name
        selection = reach._selection(method, case, 0.2, 3, options, 0)
        parts = [(method.search, (tmp_path, hidden, tokens, case.facts), "search", {"k_max": 3}),
                 (method.compose, (tmp_path, hidden, tokens, selection), "compose", {}),
                 *[(step, (hidden, selection.blocks[0]), key, {}) for key, step in list(method.steps.items())[:1]]]
        for part, records, key, more in parts:
            if part is not None:
                with checkpoints.rehearsal(), pytest.raises(checkpoints.Unread):
                    part(*records, **more, **options.get(key, {}))


def similarity(seed):
    """Random positive similarities."""
    made = torch.rand(LAYERS + 1, LAYERS + 1, generator=torch.Generator().manual_seed(seed))
    alike_LL = (made + made.T) / 2
    return Similarity(list(range(LAYERS + 1)), alike_LL, 1 - alike_LL, 1 - alike_LL, alike_LL, alike_LL, alike_LL,
                      "mask", 1, 0)


@pytest.mark.parametrize("name", [name for name, method in METHODS.items() if not method.compose
                                  and (method.search is None or method.select is in_order)])
@pytest.mark.parametrize("ratio", [0.05, 0.25, 0.45, 0.6, 0.7, 0.85])
def test_nothing_is_refused_that_some_data_allow(refused, name, ratio):
    """Where a real selection succeeds, on whatever states, nothing was refused before."""
    method = METHODS[name]
    if not refused(name, ratio):
        return
    counted = method.module_params(FACTS, {})
    for seed in range(3):
        basis = similarity(seed)
        if method.search:
            count = method.orders(FACTS, 3, {"largest": 0.5, "keep_first": 4, "keep_last": 2}) if method.orders else 30
            order = torch.randperm(LAYERS, generator=torch.Generator().manual_seed(seed)).tolist()[:count]
            basis = Search(order, [0.0] * count, "", 3, {}, 0, {})
        with pytest.raises(BlockError):
            method.select(basis, FACTS, ratio=ratio, k_max=3, module_params=counted)
