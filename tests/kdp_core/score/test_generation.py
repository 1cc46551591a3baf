"""Measures of greedy text against counts by hand, and greedy text against transformers' own."""
import pytest
import torch

from kdp_core.score import generation
from kdp_core.score.generation import GenerationError
from tests import pico

DENSE = torch.tensor([[1, 2, 3, 4, 5, 6], [1, 1, 1, 1, 1, 1]])
OTHER = torch.tensor([[1, 2, 9, 4, 5, 6], [2, 1, 1, 1, 2, 1]])


def test_greedy_text_is_that_of_transformers():
    model = pico.model("llama")
    prompt_BT = torch.randint(8, 384, (3, 7), generator=torch.Generator().manual_seed(0))
    made = model.generate(prompt_BT, attention_mask=torch.ones_like(prompt_BT), max_new_tokens=6, min_new_tokens=6,
                          do_sample=False)
    assert torch.equal(generation.greedy(model, prompt_BT, 6), made[:, 7:])


def test_agreement_counts_equal_places_and_divergence_those_before_the_first_difference():
    assert generation.agreement(DENSE, OTHER) == pytest.approx((5 + 4) / 12)
    assert generation.divergence(DENSE, OTHER) == pytest.approx((2 + 0) / 2)
    assert generation.divergence(DENSE, DENSE) == 6


def test_distinct_is_the_share_of_distinct_groups():
    # 1-grams: 6 of 6 and 1 of 6; 2-grams: 5 of 5 and 1 of 5
    assert generation.distinct(DENSE, 1) == pytest.approx((1 + 1 / 6) / 2)
    assert generation.distinct(DENSE, 2) == pytest.approx((1 + 1 / 5) / 2)
    assert generation.text_measures(DENSE, DENSE)["repetition"] == pytest.approx((0 + 2 / 3) / 2)


def test_a_continuation_too_short_for_a_group_is_refused():
    with pytest.raises(GenerationError, match="3 tokens and no group of 4"):
        generation.distinct(DENSE[:, :3], 4)


def test_stories_are_the_first_that_are_long_enough_and_all_of_one_length():
    reader, long = pico.tokenizer(), pico.documents(3)
    items = [{"document": "rain", "summary": "no"}] + [{"document": one, "summary": one[:20]} for one in long]
    asked = generation.stories(items, reader, count=2, tokens=12)
    assert asked.summaries == [one[:20] for one in long[:2]]
    assert reader.decode(asked.prompt_BT[0]).startswith(reader.decode(reader(long[0])["input_ids"][:12]))
    assert reader.decode(asked.prompt_BT[1]).endswith(generation.PROMPT)
    with pytest.raises(GenerationError, match="3 of 4 stories have 12 tokens, and 5 are asked for"):
        generation.stories(items, reader, count=5, tokens=12)


def test_rouge_is_that_of_the_greedy_summaries():
    reader, model = pico.tokenizer(), pico.model("llama")
    items = [{"document": one, "summary": one} for one in pico.documents(2)]
    asked = generation.stories(items, reader, count=2, tokens=8)
    said = reader.batch_decode(generation.greedy(model, asked.prompt_BT, 9))
    right = generation.score_xsum({"summary": items[0]["summary"]}, [said[0]])["rouge1"]
    other = generation.score_xsum({"summary": items[1]["summary"]}, [said[1]])["rouge1"]
    assert generation.rouge1(model, reader, asked, 9) == pytest.approx((right + other) / 2)


def test_lambada_counts_the_passages_whose_last_word_the_greedy_text_begins_with():
    reader, model = pico.tokenizer(), pico.model("llama")
    passages, hits = [one for text in pico.documents(4) for one in text.split(". ")], []
    for passage in passages:
        context, _, word = passage.rpartition(" ")
        ids, right = reader(context)["input_ids"], reader(f" {word}")["input_ids"]
        hits.append(generation.greedy(model, torch.tensor([ids]), len(right))[0].tolist() == right)
    # an untrained model knows no word, so one that it says is asked for
    said = reader.decode(generation.greedy(model, torch.tensor([reader(passages[0])["input_ids"]]), 1)[0])
    more = [f"{passages[0]}{said}"] if said.startswith(" ") and len(said) > 1 else []
    assert generation.lambada(model, reader, passages + more) == pytest.approx(
        (sum(hits) + len(more)) / (len(hits) + len(more)))
    with pytest.raises(GenerationError, match="passage 0 is a single word"):
        generation.lambada(model, reader, ["rain"])


def test_losses_are_relative_to_the_dense_model_and_never_below_zero():
    dense = {"agreement": 1.0, "repetition": 0.2, "lambada": 0.5, "rouge1": 0.1}
    assert generation.losses(dense, dense)["quality"] == 0
    found = generation.losses({"agreement": 0.25, "repetition": 0.6, "lambada": 0.1, "rouge1": 0.2}, dense)
    assert found == pytest.approx({"agreement": 0.75, "lambada": 0.8, "rouge1": 0.0, "repetition": 0.5,
                                   "quality": (0.75 + 0.8 + 0.5) / 4})


def test_a_score_that_the_dense_model_does_not_have_does_not_count():
    dense = {"agreement": 1.0, "repetition": 0.0, "lambada": 0.0}
    assert set(generation.losses({"agreement": 0.5, "repetition": 0.0, "lambada": 0.0}, dense)) == {
        "agreement", "repetition", "quality"}
