"""What people do with a checkpoint, run in a process that has no kdp: `python uses.py CHECKPOINT...`.

Each use is a function of a checkpoint's folder that raises where the checkpoint does not do its part. The process
writes one JSON object to stdout: checkpoint -> use -> empty string, or the error.
"""
import json
import sys
import traceback
from pathlib import Path

import httpx2
import huggingface_hub
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, pipeline

TEXTS = ["the council met", "rain would reach the coast by night while farmers in the north asked for more water"]
NEW = 6


def loaded(folder, **more):
    """The model as users load it; code of the checkpoint runs only where the checkpoint has some."""
    trust = (Path(folder) / "modeling_kdp.py").is_file()
    return AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=trust, **more).eval()


def logits(model, ids, **more):
    with torch.no_grad():
        return model(ids, **more).logits.float()


def prompts(folder, side):
    """Both texts as one padded batch, and each by itself."""
    reader = AutoTokenizer.from_pretrained(folder, padding_side=side)
    return reader, reader(TEXTS, return_tensors="pt", padding=True), [
        reader(text, return_tensors="pt")["input_ids"] for text in TEXTS]


def greedy(model, ids, **more):
    given = {"max_new_tokens": NEW, "min_new_tokens": NEW, "do_sample": False, "pad_token_id": 1,
             "attention_mask": torch.ones_like(ids)} | more
    return model.generate(ids, **given)


def close(found, expected, atol=1e-4):
    torch.testing.assert_close(found, expected, atol=atol, rtol=atol)


def padding_on_either_side(folder):
    """A padded batch gives each text the logits that it has alone, and continues it alike."""
    model = loaded(folder)
    for side in ("left", "right"):
        _, batch, alone = prompts(folder, side)
        mask = batch["attention_mask"]
        positions = (mask.cumsum(-1) - 1).clamp_min(0)
        found = logits(model, batch["input_ids"], attention_mask=mask, position_ids=positions)
        for row, ids in enumerate(alone):
            close(found[row][mask[row].bool()], logits(model, ids)[0])
    _, batch, alone = prompts(folder, "left")
    found = greedy(model, batch["input_ids"], attention_mask=batch["attention_mask"])
    for row, ids in enumerate(alone):
        assert torch.equal(found[row, -NEW:], greedy(model, ids)[0, -NEW:]), f"text {row} goes on differently"


def beam_search(folder):
    """The score of the best beam is the mean log-probability that the model itself gives it."""
    model, (_, _, alone) = loaded(folder), prompts(folder, "left")
    made = greedy(model, alone[0], num_beams=4, length_penalty=1.0, return_dict_in_generate=True, output_scores=True)
    ids = made.sequences
    log_probabilities = logits(model, ids)[0, -NEW - 1:-1].log_softmax(-1)
    total = log_probabilities.gather(1, ids[0, -NEW:, None]).sum()
    # transformers divides by the number of new tokens
    close(made.sequences_scores[0], total / NEW)


def sampling(folder):
    """A seed fixes the draws, another seed gives others, and the most likely token alone is greedy search."""
    model, (_, _, alone) = loaded(folder), prompts(folder, "left")
    draws = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        draws.append(greedy(model, alone[0], do_sample=True, temperature=2.0))
    assert torch.equal(draws[0], draws[1]) and not torch.equal(draws[0], draws[2])
    assert torch.equal(greedy(model, alone[0], do_sample=True, top_k=1), greedy(model, alone[0]))


def a_pipeline(folder):
    """`pipeline` by the folder's name continues two texts in a batch as the model does."""
    trust = (Path(folder) / "modeling_kdp.py").is_file()
    run = pipeline("text-generation", model=str(folder), trust_remote_code=trust, device="cpu")
    run.tokenizer.padding_side = "left"
    given = {"max_new_tokens": NEW, "min_new_tokens": NEW, "do_sample": False, "return_full_text": False}
    model, (reader, _, alone) = loaded(folder), prompts(folder, "left")
    expected = [reader.decode(greedy(model, ids)[0, -NEW:], skip_special_tokens=True) for ids in alone]
    assert [one[0]["generated_text"] for one in run(TEXTS, batch_size=2, **given)] == expected


def a_device_map(folder):
    """`device_map="auto"`, and a map that leaves half of the layers on disk, change nothing."""
    ids = prompts(folder, "left")[2][1]
    expected, model = logits(loaded(folder), ids), loaded(folder, device_map="auto")
    close(logits(model, ids), expected)
    base = model.base_model_prefix
    layers = next(name for name, _ in model.named_modules() if name.startswith(base) and name.endswith(".5"))[:-2]
    count = model.config.num_hidden_layers
    split = {name: "cpu" for name, _ in getattr(model, base).named_children()}
    split = {f"{base}.{name}": place for name, place in split.items() if f"{base}.{name}" != layers}
    split |= {name: "cpu" for name, _ in model.named_children() if name != base}
    split |= {f"{layers}.{number}": "disk" if number > count // 2 else "cpu" for number in range(count)}
    spread = loaded(folder, device_map=split, offload_folder=str(Path(folder) / "offload"))
    assert any(parameter.is_meta for parameter in spread.parameters()), "no layer is on disk"
    close(logits(spread, ids), expected)


def bfloat16(folder):
    """Half the memory, and logits near those of float32."""
    model, ids = loaded(folder, dtype=torch.bfloat16), prompts(folder, "left")[2][0]
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    found, expected = logits(model, ids), logits(loaded(folder), ids)
    assert torch.isfinite(found).all() and (found - expected).norm() < 0.1 * expected.norm()


def lora(folder):
    """A LoRA adapter is trained, saved, loaded on a fresh model and merged; the checkpoint's own weights stay."""
    ids, kept = prompts(folder, "left")[2][1], Path(folder) / "adapter"
    before = {name: parameter.clone() for name, parameter in loaded(folder).named_parameters()}
    torch.manual_seed(0)
    model = get_peft_model(loaded(folder), LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM"))
    optimiser = torch.optim.SGD([one for one in model.parameters() if one.requires_grad], lr=0.03)
    losses = []
    for _ in range(3):
        loss = model(ids, labels=ids).loss
        losses.append(loss.item())
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    assert losses[-1] < losses[0], losses
    model.eval().save_pretrained(kept)
    trained = logits(model, ids)
    again = PeftModel.from_pretrained(loaded(folder), kept).eval()
    close(logits(again, ids), trained)
    close(logits(again.merge_and_unload(), ids), trained)
    assert all(torch.equal(parameter, before[name]) for name, parameter in loaded(folder).named_parameters())


def exported(folder):
    """torch.export makes a program of the model that gives its logits."""
    ids = prompts(folder, "left")[2][0]
    model = loaded(folder, attn_implementation="sdpa")
    program = torch.export.export(model, (ids,), kwargs={"use_cache": False}, strict=False)
    close(program.module()(ids, use_cache=False).logits.detach(), logits(model, ids))


def pushed(folder):
    """`push_to_hub` sends weights and every file that the checkpoint needs; the network is a stub."""
    sent = []

    def answer(request):
        path = request.url.path
        sent.append((request.method, path, request.content))
        if path.endswith("/repos/create"):
            return httpx2.Response(200, json={"url": "https://huggingface.co/someone/small", "id": "someone/small"})
        if "/preupload/" in path:
            files = json.loads(request.content)["files"]
            return httpx2.Response(200, json={"files": [{"path": file["path"], "uploadMode": "regular",
                                                        "shouldIgnore": False} for file in files]})
        if "/commit/" in path:
            url = "https://huggingface.co/someone/small/commit/0"
            return httpx2.Response(200, json={"commitOid": "0" * 40, "commitUrl": url, "pullRequestUrl": None})
        return httpx2.Response(200, json={"type": "user", "name": "someone"})

    huggingface_hub.set_client_factory(lambda: httpx2.Client(transport=httpx2.MockTransport(answer)))
    huggingface_hub.constants.HF_HUB_OFFLINE = False
    try:
        loaded(folder).push_to_hub("someone/small", token="hf_none")
        AutoTokenizer.from_pretrained(folder).push_to_hub("someone/small", token="hf_none")
        huggingface_hub.upload_folder(repo_id="someone/small", folder_path=folder, token="hf_none",
                                      allow_patterns=["*.md", "*.json", "*.py"])
    finally:
        huggingface_hub.constants.HF_HUB_OFFLINE = True
    commits = [content.decode() for _, path, content in sent if "/commit/" in path]
    names = [{json.loads(line)["value"]["path"] for line in one.splitlines() if '"path"' in line} for one in commits]
    needed = {"config.json", "model.safetensors"} | (
        {"modeling_kdp.py"} if (Path(folder) / "modeling_kdp.py").is_file() else set())
    assert needed <= names[0], names
    assert "tokenizer.json" in names[1] and "config.json" in names[2], names


def saved_again(folder):
    """`save_pretrained` in another precision gives a checkpoint that loads in the same way."""
    again = Path(folder) / "again"
    loaded(folder, dtype=torch.bfloat16).save_pretrained(again)
    AutoTokenizer.from_pretrained(folder).save_pretrained(again)
    assert {tensor.dtype for tensor in load_file(again / "model.safetensors").values()
            if tensor.is_floating_point()} == {torch.bfloat16}
    ids = prompts(folder, "left")[2][0]
    close(logits(loaded(again), ids), logits(loaded(folder, dtype=torch.bfloat16), ids))


USES = {use.__name__: use for use in (padding_on_either_side, beam_search, sampling, a_pipeline, a_device_map, bfloat16,
                                      lora, exported, pushed, saved_again)}


def main(folders):
    found = {}
    for folder in folders:
        for name, use in USES.items():
            try:
                use(folder)
                error = ""
            except Exception:
                error = traceback.format_exc()[-1500:]
            found.setdefault(folder, {})[name] = error
    assert not any(name.split(".")[0] in ("kdp", "kdp_core") for name in sys.modules), "kdp was imported"
    print(json.dumps(found))


if __name__ == "__main__":
    main(sys.argv[1:])
