"""What a model must be to be pruned: what is refused, and that every family is taken."""
import pytest
import torch
import transformers

from kdp_core.model import checkpoints, intake
from tests import pico


@pytest.mark.parametrize("config, words", [
    ({"model_type": "llama4", "text_config": {"num_local_experts": 16}}, "llama4 is a mixture of experts"),
    ({"model_type": "gemma3", "text_config": {"model_type": "gemma3_text"}}, "gemma3 holds more than text"),
    ({"model_type": "gptj"}, "'gptj' is not supported; choose one of llama, mistral"),
    ({"model_type": "gpt_neox", "use_parallel_residual": False}, "use_parallel_residual is False in this gpt_neox"),
    ({"model_type": "gpt2", "scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx is True in"),
])
def test_models_of_another_kind_are_refused_in_one_line(config, words):
    with pytest.raises(intake.ModelError, match=words) as caught:
        intake.check_config(config, "here")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("family", pico.EVERY)
def test_a_model_of_every_family_is_taken(family):
    intake.check_config(pico.model(family, layers=2).config.to_dict(), "here")


@torch.no_grad()
def test_the_text_model_of_a_gemma_3_with_vision_is_taken_out_as_the_refusal_says(tmp_path):
    text = pico.model("gemma3_text", layers=2).config
    # as in every published Gemma 3; the model with vision has no soft cap whatever this entry says
    text.final_logit_softcapping = None
    vision = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2,
              "image_size": 28, "patch_size": 14}
    torch.manual_seed(0)
    whole = transformers.Gemma3ForConditionalGeneration(transformers.Gemma3Config(
        text_config=text.to_dict(), vision_config=vision, mm_tokens_per_image=4)).eval()
    whole.save_pretrained(tmp_path / "whole")
    with pytest.raises(intake.ModelError, match="take its gemma3_text model out") as caught:
        intake.check_config(whole.config.to_dict(), "here")
    assert intake.TAKE_OUT in str(caught.value)
    exec(intake.TAKE_OUT, {"AutoConfig": transformers.AutoConfig, "path": tmp_path / "whole",
                           "AutoModelForCausalLM": transformers.AutoModelForCausalLM, "folder": tmp_path / "text"})
    taken, ids_ST = checkpoints.load_model(tmp_path / "text"), torch.arange(2, 14).view(1, 12)
    intake.check_config(taken.config.to_dict(), "here")
    assert torch.equal(taken(ids_ST).logits, whole(ids_ST).logits)
