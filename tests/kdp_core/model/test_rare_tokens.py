"""An embedding with rows of low rank for rare tokens: lookups, the tied head, sizes, copies, the family's scale."""
import copy

import pytest
import torch

from kdp_core.model.families import output_head
from kdp_core.model.folded import FOLDED
from kdp_core.model.sizes import count_macs, count_params
from kdp_core.model.stand_ins import RareEmbedding, RareHead
from kdp_core.model.surgery import head_is_tied, reduce_rare
from tests import pico
from tests.kdp_core.model.random_weights import logits

VOCABULARY, WIDTH, FREQUENT, RANK = 20, 8, 6, 3


@pytest.fixture
def embedding():
    made, generator = RareEmbedding(VOCABULARY, WIDTH, FREQUENT, RANK, scale=2.5), torch.Generator().manual_seed(0)
    for parameter in made.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator)
    made.place.copy_(torch.randperm(VOCABULARY, generator=generator))
    return made.requires_grad_(False)


def test_a_lookup_gives_the_scaled_row_and_the_head_multiplies_by_the_rows(embedding):
    ids, h = torch.tensor([[0, 7, 19], [5, 5, 2]]), torch.randn(4, WIDTH, generator=torch.Generator().manual_seed(1))
    rows = embedding.rows()
    assert torch.allclose(embedding(ids), 2.5 * rows[ids], atol=1e-6)
    assert torch.allclose(RareHead(embedding)(h), h @ rows.T, atol=1e-5)
    frequent = (embedding.place < FREQUENT).nonzero()[:, 0]
    assert torch.equal(rows[frequent], embedding.frequent[embedding.place[frequent].long()])


def test_the_head_adds_no_parameters_and_its_multiply_adds_count(embedding):
    head = RareHead(embedding)
    stored = FREQUENT * WIDTH + (VOCABULARY - FREQUENT) * RANK + RANK * WIDTH
    assert count_params(embedding) == stored + WIDTH and count_params(head) == 0
    assert count_macs(head) == stored < VOCABULARY * WIDTH


@pytest.mark.parametrize("family", ["llama", "gemma3_text", "gemma2"])
def test_a_model_with_all_rows_in_place_computes_the_same(family):
    model = pico.model(family, layers=2)
    expected, dense = logits(model), model.get_input_embeddings()
    vocabulary = dense.num_embeddings
    assert head_is_tied(model)
    reduce_rare(model, vocabulary - 5, 4)
    new, (*_, last) = model.get_input_embeddings(), dense.weight
    new.frequent.data, new.mean.data = dense.weight[:-5].detach().clone(), last.detach().clone()
    new.place.copy_(torch.arange(vocabulary))
    found = logits(model)
    # the five rare rows are all the mean, the last row
    assert torch.allclose(found[..., :-5], expected[..., :-5], atol=1e-5)
    assert torch.allclose(found[..., -1], expected[..., -1], atol=1e-5)
    assert head_is_tied(model) and isinstance(output_head(model), RareHead)


def test_a_copy_reads_its_own_embedding():
    config_class, model_class = FOLDED["llama"]
    given = {key: value for key, value in pico.model("llama", layers=2).config.to_dict().items() if key != "model_type"}
    model = model_class(config_class(**given | {"tie_word_embeddings": False,
                                                "rare_tokens": {"frequent": 100, "rank": 4}})).eval()
    copied = copy.deepcopy(model)
    assert output_head(copied).embedding is copied.get_input_embeddings()
    for parameter in model.get_input_embeddings().parameters():
        parameter.data.fill_(1.0)
    assert not torch.equal(logits(copied), logits(model))
