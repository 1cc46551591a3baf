"""Hidden states: the right states and no others, stored as promised, whole or not at all."""
import hashlib
import logging
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import zarr

from kdp_core.base.options import OptionError
from kdp_core.base.records import Tokens
from kdp_core.model.families import decoder_layers
from kdp_core.states import hidden
from kdp_core.states.chunks import LostChunk
from kdp_core.states.hidden import HalfOverflow, HiddenError, boundary_states, extract, join, read
from tests import pico

LAYERS = 5


def tokens(sequences=5, length=12, seed=3) -> Tokens:
    ids_ST = torch.randint(384, (sequences, length), generator=torch.Generator().manual_seed(seed))
    return Tokens(ids_ST, ["made"] * sequences, {"seed": seed})


def final_norm(model):
    return model.model.decoder.final_layer_norm if model.config.model_type == "opt" else model.model.norm


def extracted(tmp_path, model, sample, **options):
    extract(model, sample, tmp_path / "hidden.zarr", **options)
    return read(tmp_path / "hidden.zarr")


def scale_token(model, token: int, factor: float):
    """Make the embedding of one token, and with it its norm in state 0, larger."""
    with torch.no_grad():
        model.get_input_embeddings().weight[token] *= factor
    return model


@pytest.mark.parametrize("family", pico.FAMILIES)
@torch.inference_mode()
def test_states_are_those_of_transformers(tmp_path, family):
    model, sample = pico.model(family, layers=LAYERS), tokens()
    states = extracted(tmp_path, model, sample, dtype="float32", batch_sequences=2)
    theirs = model(sample.ids_ST, output_hidden_states=True).hidden_states
    assert states.layers == list(range(LAYERS + 1))
    for k in range(LAYERS):
        torch.testing.assert_close(states.state(k), theirs[k], rtol=0, atol=1e-5)
    # transformers' last state is taken after the final norm, ours before it
    torch.testing.assert_close(final_norm(model)(states.state(LAYERS)), theirs[LAYERS], rtol=0, atol=1e-5)
    assert (states.state(LAYERS) - theirs[LAYERS]).abs().max() > 0.1
    direct = model.lm_head(final_norm(model)(states.state(LAYERS)))
    torch.testing.assert_close(direct, model(sample.ids_ST).logits, rtol=0, atol=1e-4)


@pytest.mark.parametrize("family", pico.FAMILIES)
@torch.inference_mode()
def test_a_layer_maps_its_state_to_the_next(tmp_path, family):
    model, sample = pico.model(family, layers=LAYERS), tokens()
    states = extracted(tmp_path, model, sample, dtype="float32", layers=[2, 3, LAYERS - 1, LAYERS])
    seen = {}
    for k in (2, LAYERS - 1):
        decoder_layers(model)[k].register_forward_hook(
            lambda _, args, output, k=k: seen.update({k: output[0] if isinstance(output, tuple) else output}))
    model(sample.ids_ST)
    for k, output in seen.items():
        torch.testing.assert_close(output, states.state(k + 1), rtol=0, atol=1e-5)


def test_batch_size_does_not_matter(tmp_path):
    model, sample = pico.model("llama", layers=LAYERS), tokens(sequences=5)
    whole = extracted(tmp_path / "whole", model, sample, dtype="float32", batch_sequences=8)
    for batch in (1, 2, 5):
        parts = extracted(tmp_path / str(batch), model, sample, dtype="float32", batch_sequences=batch)
        assert torch.equal(parts.massive_LST, whole.massive_LST)
        for k in whole.layers:
            torch.testing.assert_close(parts.state(k), whole.state(k), rtol=0, atol=1e-5)


def test_float16_is_float32_rounded(tmp_path):
    model, sample = pico.model("llama", layers=LAYERS), tokens()
    full = extracted(tmp_path / "full", model, sample, dtype="float32")
    half = extracted(tmp_path / "half", model, sample)
    assert zarr.open_group(half.path)["states"].dtype == "float16"
    assert half.provenance == {"seed": 3, "model_type": "llama", "dtype": "float16"}
    assert all(torch.equal(half.state(k), full.state(k).half().float()) for k in full.layers)


@pytest.mark.parametrize("family", pico.FAMILIES)
def test_only_what_is_asked_for_runs(tmp_path, family):
    model, sample = pico.model(family, layers=LAYERS), tokens()
    ran = []
    for k, layer in enumerate(decoder_layers(model)):
        layer.self_attn.register_forward_pre_hook(lambda _, args, k=k: ran.append(k))
    before = [len(layer._forward_pre_hooks) for layer in decoder_layers(model)]
    states = extracted(tmp_path, model, sample, layers=[3, 1, 3], dtype="float32")
    assert sorted(set(ran)) == [0, 1, 2], "layer 3's input is known before layer 3 runs"
    assert states.layers == [1, 3]
    assert zarr.open_group(states.path)["states"].shape == (2, 5, 12, 32)
    assert [len(layer._forward_pre_hooks) for layer in decoder_layers(model)] == before, "hooks were left"
    full = boundary_states(model, sample.ids_ST, list(range(LAYERS + 1)))
    assert torch.equal(states.state(3), full[3]) and torch.equal(states.state(1), full[1])


@pytest.mark.parametrize("layers", [None, [0], [LAYERS]])
def test_output_head_and_final_norm_never_run(tmp_path, layers):
    model = pico.model("llama", layers=LAYERS)

    def refuse(*_):
        raise AssertionError("ran")

    model.lm_head.forward = model.model.norm.forward = refuse
    states = extracted(tmp_path, model, tokens(), layers=layers)
    assert states.layers == (layers or list(range(LAYERS + 1)))


@pytest.mark.parametrize("layers", [[], [-1, 2], [LAYERS + 1]])
def test_layers_the_model_lacks(tmp_path, layers):
    with pytest.raises(HiddenError, match=f"the model has states 0 to {LAYERS}"):
        extract(pico.model("llama", layers=LAYERS), tokens(), tmp_path / "h.zarr", layers=layers)
    assert list(tmp_path.iterdir()) == []


def test_unknown_dtype_is_told_before_the_model_runs(tmp_path):
    model = pico.model("llama", layers=2)
    model.model.forward = lambda *_, **__: pytest.fail("the model ran")
    with pytest.raises(OptionError, match="dtype is 'bfloat16'; choose one of auto, float16, float32"):
        extract(model, tokens(), tmp_path / "h.zarr", dtype="bfloat16")


def test_overflow_of_float16(tmp_path, caplog):
    sample = tokens()
    # the largest entry comes in the second batch: what was written before must be written anew
    sample.ids_ST[sample.ids_ST == 7] = 8
    sample.ids_ST[4, 5] = 7
    model = scale_token(pico.model("llama", layers=2), 7, 1e6)
    with pytest.raises(HalfOverflow, match=r"state 0 reaches \d+, above float16's 65504; set hidden\.dtype"):
        extract(model, sample, tmp_path / "half.zarr", dtype="float16", batch_sequences=3)
    assert list(tmp_path.iterdir()) == []
    with caplog.at_level(logging.WARNING):
        states = extracted(tmp_path, model, sample, dtype="auto", batch_sequences=3)
    assert "storing float32 instead" in caplog.text
    assert states.provenance["dtype"] == "float32"
    assert states.state(0).abs().max() > hidden.HALF_MAX
    embedded = model.get_input_embeddings().weight[sample.ids_ST].detach()
    assert torch.equal(states.state(0), embedded)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_broken_weights_name_the_first_broken_state(tmp_path, value):
    model = pico.model("llama", layers=LAYERS)
    model.model.layers[2].mlp.down_proj.weight.data[0, 0] = value
    with pytest.raises(HiddenError, match=r"state 3 is not finite") as error:
        extract(model, tokens(), tmp_path / "h.zarr")
    assert not isinstance(error.value, HalfOverflow), "float32 would not help"
    assert list(tmp_path.iterdir()) == []


def test_layout(tmp_path):
    states = extracted(tmp_path, pico.model("llama", layers=LAYERS), tokens(), batch_sequences=2, massive_factor=4.0)
    group = zarr.open_group(states.path, mode="r")
    assert group.metadata.zarr_format == 3
    names = ("layer", "sequence", "token")
    for name, axes, chunks in (("states", (*names, "width"), (1, 2, 12, 32)), ("norm", names, (1, 5, 12)),
                               ("massive", names, (1, 5, 12)),
                               ("sublayers", ("layer", "part", "sequence"), (LAYERS, 2, 5))):
        assert group[name].metadata.dimension_names == axes
        assert group[name].chunks == chunks
        assert group[name].compressors == ()
    assert dict(group.attrs)["layers"] == list(range(LAYERS + 1))
    assert (states.sequences, states.tokens, states.width, states.massive_factor) == (5, 12, 32, 4.0)
    with pytest.raises(HiddenError, match=r"state 9 is not stored \(stored: \[0, 1, 2, 3, 4, 5\]\)"):
        states.state(9)


@pytest.mark.parametrize("last", [0, 3, LAYERS])
def test_sublayers_are_those_of_the_layers_that_ran(tmp_path, last):
    model, sample = pico.lively(pico.model("opt", layers=LAYERS)), tokens()
    whole, part = (extracted(tmp_path / str(n), model, sample, layers=layers, dtype="float32").sublayers()
                   for n, layers in enumerate((None, [last])))
    assert whole.shape == (LAYERS, 2, 5) and torch.equal(part, whole[:last])


def test_massive_tokens(tmp_path):
    sample = tokens()
    sample.ids_ST[sample.ids_ST == 7] = 8
    sample.ids_ST[1, 4] = sample.ids_ST[3, 0] = 7
    model = scale_token(pico.model("llama", layers=2), 7, 100.0)
    states = extracted(tmp_path, model, sample, dtype="float32", massive_factor=8.0)
    expected_ST = sample.ids_ST == 7
    assert torch.equal(states.massive([0]), expected_ST)
    for place, k in enumerate(states.layers):
        norm_ST = states.state(k).norm(dim=-1)
        assert torch.equal(states.massive_LST[place], norm_ST > 8.0 * norm_ST.median())
    assert torch.equal(states.massive(states.layers), states.massive_LST.any(0))
    assert not extracted(tmp_path, model, sample, massive_factor=1e6).massive_LST.any()


KILLED = """
import os, sys, torch
sys.path.insert(0, {root!r})
from kdp_core.states import hidden
from kdp_core.states.chunks import LostChunk
from tests import pico
from tests.kdp_core.states.test_hidden import tokens
torch.set_num_threads(1)
inner, calls = hidden._states, []
def slow(*args):
    calls.append(1)
    if len(calls) == 3:
        print("middle", flush=True)
        sys.stdin.read()
    return inner(*args)
hidden._states = slow
hidden.extract(pico.model("llama", layers=2), tokens(), {path!r}, batch_sequences=1)
"""


def content(folder: Path) -> dict[str, str]:
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
            for path in sorted(folder.rglob("*")) if path.is_file()}


def test_kill_in_the_middle_leaves_nothing_and_a_rerun_is_the_same(tmp_path):
    path = tmp_path / "killed.zarr"
    code = KILLED.format(root=str(Path(__file__).parents[3]), path=str(path))
    with subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
                          env={**os.environ, "OMP_NUM_THREADS": "1"}) as process:
        assert process.stdout.readline() == "middle\n"
        process.send_signal(signal.SIGKILL)
    assert process.returncode == -signal.SIGKILL
    left = list(tmp_path.iterdir())
    assert len(left) == 1 and left[0].suffix == ".tmp" and content(left[0]), "it was killed before it had written"
    for name in ("killed.zarr", "undisturbed.zarr"):
        extract(pico.model("llama", layers=2), tokens(), tmp_path / name, batch_sequences=1)
    assert content(path) == content(tmp_path / "undisturbed.zarr")
    assert len(content(path)) > 5


BORDERS = {"even": [(0, 4), (4, 8), (8, 11)], "uneven": [(0, 2), (2, 8), (8, 10), (10, 11)], "one": [(0, 11)]}


def shards(folder, model, sample, borders, **options):
    """The shards of these sequences, each a folder named by them."""
    for start, stop in borders:
        extract(model, sample, folder / f"{start}-{stop}", (start, stop), **options)
    return [folder / f"{start}-{stop}" for start, stop in borders]


@pytest.mark.parametrize("borders", BORDERS.values(), ids=BORDERS)
@pytest.mark.parametrize("dtype", ["auto", "float32"])
def test_joined_shards_have_the_bytes_of_an_extraction_that_was_never_split(tmp_path, borders, dtype):
    model, sample = pico.model("llama", layers=LAYERS), tokens(sequences=11)
    options = {"batch_sequences": 2, "dtype": dtype, "layers": [0, 2, LAYERS]}
    extract(model, sample, tmp_path / "whole.zarr", massive_factor=1.2, **options)
    assert read(tmp_path / "whole.zarr").massive_LST.any()
    made = shards(tmp_path / "shards", model, sample, borders, **options)
    # in whatever order they are given
    join(made[::-1], tmp_path / "joined.zarr", massive_factor=1.2)
    assert content(tmp_path / "joined.zarr") == content(tmp_path / "whole.zarr")
    links = {path.stat().st_nlink for path in (tmp_path / "joined.zarr/states/c").rglob("*") if path.is_file()}
    assert links == {2}, "states were copied"


def test_shards_are_joined_where_links_stay_in_a_folder_and_where_states_are_zero(tmp_path, monkeypatch):
    model, sample = pico.model("llama", layers=2), tokens(sequences=4)
    with torch.no_grad():
        model.get_input_embeddings().weight[sample.ids_ST[2:].unique()] = 0
    extract(model, sample, tmp_path / "whole.zarr", batch_sequences=2)
    made = shards(tmp_path, model, sample, [(0, 2), (2, 4)], batch_sequences=2)
    assert {path.stat().st_size for path in (made[1] / "states/c").rglob("*") if path.is_file()} == {2 * 12 * 32 * 2}

    inner = os.link

    def within_a_folder(source, target):
        if Path(source).parent != Path(target).parent:
            raise PermissionError(f"no link from {source}")
        inner(source, target)

    monkeypatch.setattr(os, "link", within_a_folder)
    join(made, tmp_path / "joined.zarr")
    assert content(tmp_path / "joined.zarr") == content(tmp_path / "whole.zarr")


def test_a_lost_or_short_chunk_is_not_read_as_zeros(tmp_path):
    """A quota that ran out, or a copy that was cut short: zarr would give zeros for the one."""
    whole = extracted(tmp_path, pico.model("llama", layers=2), tokens(), batch_sequences=2)
    for name, read_it in (("states/c/1/0/0/0", lambda: whole.state(1)), ("massive/c/1/0/0", lambda: read(whole.path)),
                          ("sublayers/c/0/0/0", whole.sublayers)):
        file = whole.path / name
        kept = file.read_bytes()
        for left in (None, kept[:-4]):
            file.unlink(missing_ok=True)
            if left is not None:
                file.write_bytes(left)
            with pytest.raises(LostChunk, match=rf"{name} holds {len(left or b'')} bytes of {len(kept)}.*delete "):
                read_it()
        file.write_bytes(kept)
        read_it()


def test_shards_that_lost_a_chunk_are_not_joined(tmp_path):
    made = shards(tmp_path, pico.model("llama", layers=2), tokens(sequences=4), [(0, 2), (2, 4)], batch_sequences=2)
    for name in ("states/c/1/0/0/0", "norm/c/0/0/0"):
        (made[1] / name).rename(tmp_path / "aside")
        with pytest.raises(LostChunk, match=f"{name} holds 0 bytes of "):
            join(made, tmp_path / "joined.zarr")
        (tmp_path / "aside").rename(made[1] / name)
    assert not (tmp_path / "joined.zarr").exists()


@pytest.mark.parametrize("sequences", [(0, 3), (1, 4), (4, 4), (4, 6), (-2, 2)])
def test_a_shard_is_of_whole_batches(tmp_path, sequences):
    with pytest.raises(HiddenError, match="5 sequences is not of whole batches of 2; let it begin and end at"):
        extract(pico.model("llama", layers=2), tokens(), tmp_path / "part", sequences, batch_sequences=2)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("borders, change, words", [
    ([(0, 2), (4, 5)], {}, "shards 0-2, 4-5 are not sequences 0 to 5, each once"),
    ([(0, 2), (2, 4)], {}, "shards 0-2, 2-4 are not sequences 0 to 5"),
    ([(0, 4), (2, 4), (4, 5)], {}, "shards 0-4, 2-4, 4-5 are not"),
    ([(0, 2), (2, 5)], {"layers": [1]}, "shard 2-5 was extracted with other options"),
    ([(0, 2), (2, 5)], {"batch_sequences": 1}, "shard 2-5 was extracted with other options"),
    ([(0, 2), (2, 5)], {"sample": tokens(seed=4)}, "shard 2-5 was extracted with other options or tokens"),
])
def test_shards_that_are_not_one_extraction_are_refused(tmp_path, borders, change, words):
    model, options = pico.model("llama", layers=2), {"sample": tokens(), "batch_sequences": 2}
    made = shards(tmp_path / "s", model, borders=borders[:-1], **options)
    made += shards(tmp_path / "s", model, borders=borders[-1:], **options | change)
    with pytest.raises(HiddenError, match=words):
        join(made, tmp_path / "joined.zarr")
    assert not list(tmp_path.glob("*joined*"))


def test_shards_of_two_precisions_are_named_with_the_remedy(tmp_path):
    sample = tokens()
    sample.ids_ST[sample.ids_ST == 7] = 8
    sample.ids_ST[3, 5] = 7
    model = scale_token(pico.model("llama", layers=2), 7, 1e6)
    extract(model, sample, tmp_path / "whole.zarr", batch_sequences=2)
    borders = [(0, 2), (2, 4), (4, 5)]
    made = shards(tmp_path / "auto", model, sample, borders, batch_sequences=2)
    with pytest.raises(HiddenError, match=r"sequences 2-4 hold states above float16's 65504 and were stored as "
                                          r"float32, but 0-2, 4-5 as float16; set hidden\.dtype to float32"):
        join(made, tmp_path / "joined.zarr")
    join(shards(tmp_path / "float32", model, sample, borders, batch_sequences=2, dtype="float32"),
         tmp_path / "joined.zarr")
    assert content(tmp_path / "joined.zarr") == content(tmp_path / "whole.zarr")
