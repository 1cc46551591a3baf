"""Documents and packing: what a window holds, what the order depends on, and what is refused."""
import json
from collections import Counter

import datasets
import pytest
import torch

from kdp_core.base import texts
from kdp_core.base.options import OptionError
from kdp_core.base.texts import Part, TextError, pack, prompt_ids, read_documents, read_hub_documents, windows
from tests import pico


@pytest.fixture(scope="module")
def tokenizer():
    return pico.tokenizer()


def parts(first=6, second=3):
    return [Part("news", pico.documents(40, seed=1), first), Part("notes", pico.documents(30, seed=2), second)]


def test_lines_text_and_jsonl(tmp_path):
    path = tmp_path / "a.cor"
    path.write_bytes("caf\xe9 one\r\n\n  \ntwo\x85still two\n".encode("latin-1"))
    assert read_documents(path, format="lines", encoding="latin-1") == ["caf\xe9 one", "two\x85still two"]
    assert read_documents(path, format="text", encoding="latin-1") == ["caf\xe9 one\n\n  \ntwo\x85still two\n"]
    path.write_text("".join(json.dumps({"body": text}) + "\n\n" for text in ("x\ny", "", "z")))
    assert read_documents(path, format="jsonl", field="body") == ["x\ny", "z"]


def test_several_fields_make_one_document(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps({"q": "who {a}?", "a": ["she", "he"], "n": 3}) + "\n")
    assert read_documents(path, format="jsonl", field="Q: {q} A: {a}") == ["Q: who {a}? A: she he"]
    with pytest.raises(TextError, match=r"line 1: no text in field 'n', it has a, n, q"):
        read_documents(path, format="jsonl", field="{q} {n}")


@pytest.mark.parametrize("content, options, message", [
    (b'{"text": "a"}\n{"body": "b"}\n', {"format": "jsonl"}, r"a\.txt, line 2: no text in field 'text', it has body"),
    (b'{"text": "a"}\n\n{"text": \n', {"format": "jsonl"}, r"a\.txt, line 3: not JSON"),
    (b'[1]\n', {"format": "jsonl"}, r"line 1: no text in field 'text', it has list"),
    (b"caf\xe9", {"format": "lines"}, "not utf-8 .* at byte 3.*set the text's encoding"),
    (b"a", {"format": "lines", "encoding": "no-such"}, "no-such"),
    (b" \n\n", {"format": "lines"}, "holds no text"),
])
def test_unreadable_texts_name_file_and_line(tmp_path, content, options, message):
    path = tmp_path / "a.txt"
    path.write_bytes(content)
    with pytest.raises(TextError, match=message):
        read_documents(path, **options)


def test_unknown_format(tmp_path):
    with pytest.raises(OptionError, match="format is 'csv'; choose one of lines, text, jsonl"):
        read_documents(tmp_path / "a.txt", format="csv")


def test_absent_file(tmp_path):
    with pytest.raises(TextError, match=r"absent\.txt cannot be read"):
        read_documents(tmp_path / "absent.txt", format="text")


def test_hub_documents_are_streamed_to_the_limit(monkeypatch, tmp_path):
    asked = {}

    def load_dataset(name, config, **options):
        asked.update(options, name=name, config=config)
        yield from ({"text": text} for text in ("a", "", "b"))
        raise AssertionError("read beyond the limit")

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    found = read_hub_documents("org/data", revision="abc", config="raw", split="train", field="text", cache=tmp_path,
                               limit=3)
    assert found == ["a", "b"]
    assert asked == {"name": "org/data", "config": "raw", "split": "train", "revision": "abc", "streaming": True,
                     "cache_dir": str(tmp_path)}


@pytest.mark.parametrize("items, message", [
    (ConnectionError("offline"), r"hf-data:org/data@main, split train cannot be read: offline"),
    ([{"text": "a"}, {"body": "b"}], r"item 1: no text in field 'text', it has body"),
    ([], "holds no text"),
])
def test_hub_failures(monkeypatch, items, message):
    def load_dataset(name, config, **options):
        if isinstance(items, Exception):
            raise items
        return items

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    with pytest.raises(TextError, match=message):
        read_hub_documents("org/data", revision="main", config=None, split="train", field="text")


def test_windows_lose_nothing(tokenizer):
    documents = pico.documents(20)
    ids_ST = windows(tokenizer, documents, length=32)
    joined = "\n".join(documents)
    whole = tokenizer(joined, add_special_tokens=False)["input_ids"]
    assert ids_ST.dtype == torch.int64 and len(ids_ST) == len(whole) // 32
    assert ids_ST.flatten().tolist() == whole[:ids_ST.numel()]
    text = tokenizer.decode(ids_ST.flatten(), clean_up_tokenization_spaces=False)
    assert joined.startswith(text) and len(joined) - len(text) < 32 * 20


@pytest.mark.parametrize("guess", [1, 6])
@pytest.mark.parametrize("sequences", [1, 7, 40])
def test_a_tokenised_prefix_gives_the_tokens_of_the_whole_text(tokenizer, monkeypatch, guess, sequences):
    """Against the independent route, all of the text at once; a guess of 1 forces several rounds of doubling."""
    monkeypatch.setattr(texts, "CHARACTERS_PER_TOKEN", guess)
    document = "\n".join(pico.documents(100))
    made = pack(tokenizer, [Part("news", [document], sequences)], length=16, seed=3)
    whole = tokenizer(document, add_special_tokens=False)["input_ids"]
    assert len(whole) > 2 * 40 * 16
    assert sorted(made.ids_ST.tolist()) == sorted(whole[i * 16:(i + 1) * 16] for i in range(sequences))


@pytest.mark.parametrize("guess", [2, 3, 4])
def test_a_cut_within_a_word_does_not_show(tokenizer, monkeypatch, guess):
    """Prefixes of every length end within words too; the cut must not change the tokens that are kept."""
    monkeypatch.setattr(texts, "CHARACTERS_PER_TOKEN", guess)
    document = "".join(pico.documents(20))
    whole = tokenizer(document, add_special_tokens=False)["input_ids"]
    for count in range(1, 60):
        made = pack(tokenizer, [Part("news", [document], 1)], length=count, seed=0)
        assert made.ids_ST[0].tolist() == whole[:count]


def test_documents_are_joined_by_newlines(tokenizer):
    documents = pico.documents(2)
    either = [tokenizer("\n".join(pair), add_special_tokens=False)["input_ids"]
              for pair in (documents, documents[::-1])]
    length = len(either[0])
    made = pack(tokenizer, [Part("two", documents, 1)], length=length, seed=0)
    assert made.ids_ST[0].tolist() in either


def test_every_document_is_used_once(tokenizer):
    """Windows of one token over the whole text: each document's tokens, and a newline between two."""
    documents = [f"{word} {number}" for number in range(40) for word in ("rain", "water")]
    tokens = Counter(i for text in documents for i in tokenizer(text, add_special_tokens=False)["input_ids"])
    tokens.update(tokenizer("\n", add_special_tokens=False)["input_ids"] * (len(documents) - 1))
    made = pack(tokenizer, [Part("lines", documents, tokens.total())], length=1, seed=5)
    assert Counter(made.ids_ST.flatten().tolist()) == tokens


def test_only_as_much_is_tokenised_as_needed(tokenizer):
    seen = []

    def counting(text, **options):
        seen.append(len(text))
        return tokenizer(text, **options)

    pack(counting, [Part("news", pico.documents(2000), 4)], length=32, seed=0)
    assert sum(seen) < 0.05 * len("\n".join(pico.documents(2000)))


def test_same_seed_same_bits_other_seed_other_order(tokenizer):
    first, again, other = (pack(tokenizer, parts(), length=32, seed=seed) for seed in (0, 0, 1))
    assert torch.equal(first.ids_ST, again.ids_ST) and first.sources == again.sources
    assert first.provenance == again.provenance and first.provenance["sha256"] != other.provenance["sha256"]
    assert not torch.equal(first.ids_ST, other.ids_ST)


def test_order_is_pinned_across_processes(tokenizer):
    """hash() would differ from one process to the next; these orders may not."""
    made = pack(tokenizer, parts(4, 4), length=32, seed=0)
    assert made.sources == ["notes", "notes", "news", "notes", "news", "news", "news", "notes"]


def test_mix_takes_its_count_of_each_and_parts_do_not_change_each_other(tokenizer):
    made = pack(tokenizer, parts(6, 3), length=32, seed=0)
    assert made.ids_ST.shape == (9, 32) and Counter(made.sources) == {"news": 6, "notes": 3}
    assert made.sources != sorted(made.sources)
    alone = pack(tokenizer, parts(6, 3)[:1], length=32, seed=0)
    news = {tuple(ids) for ids, name in zip(made.ids_ST.tolist(), made.sources, strict=True) if name == "news"}
    assert news == {tuple(ids) for ids in alone.ids_ST.tolist()}
    assert made.provenance["parts"]["notes"] == {"documents": 30, "sequences": 3}


@pytest.mark.parametrize("mix, length, message", [
    ([Part("news", ["rain water"] * 3, 50)], 16, r"text 'news' gives \d sequences of 16 tokens .*50 are asked for"),
    ([], 16, "at least one text"),
    ([Part("a", ["x"], 1), Part("a", ["y"], 1)], 16, "name of its own"),
    ([Part("a", ["x"], 0)], 16, "0 sequences"),
    ([Part("a", ["x"], 1)], 0, "of 0 tokens"),
])
def test_mixes_that_cannot_be_made(tokenizer, mix, length, message):
    with pytest.raises(TextError, match=message):
        pack(tokenizer, mix, length=length, seed=0)


def test_vocabulary_mismatch(tokenizer):
    documents = pico.documents(5)
    largest = int(windows(tokenizer, documents, length=8).max())
    windows(tokenizer, documents, length=8, vocabulary=largest + 1)
    for make in (lambda: windows(tokenizer, documents, length=8, vocabulary=largest),
                 lambda: pack(tokenizer, [Part("a", documents, 3)], length=8, seed=0, vocabulary=50)):
        with pytest.raises(TextError, match="vocabulary mismatch"):
            make()


def test_windows_of_too_little_text(tokenizer):
    with pytest.raises(TextError, match=r"less than one window of 64"):
        windows(tokenizer, ["rain"], length=64)
    with pytest.raises(TextError, match="at least 1 token"):
        windows(tokenizer, ["rain"], length=0)


def test_windows_that_begin_with_a_token_of_their_own(tokenizer):
    """Each holds one token of the text less; the text goes on where the window before ends."""
    plain_N = windows(tokenizer, pico.documents(3), length=1).view(-1)
    ids_ST = windows(tokenizer, pico.documents(3), length=12, start=0)
    assert ids_ST.shape == (len(plain_N) // 11, 12) and bool((ids_ST[:, 0] == 0).all())
    assert torch.equal(ids_ST[:, 1:].reshape(-1), plain_N[:ids_ST[:, 1:].numel()])
    tokens = pack(tokenizer, parts(), length=12, seed=3, start=0)
    assert tokens.ids_ST.shape == (9, 12) and bool((tokens.ids_ST[:, 0] == 0).all())
    assert torch.equal(tokens.ids_ST[:, 1:], pack(tokenizer, parts(), length=11, seed=3).ids_ST)
    with pytest.raises(TextError, match="window of 1 tokens holds no text"):
        windows(tokenizer, pico.documents(3), length=1, start=0)


def begun(adds):
    made = pico.tokenizer()
    made.add_bos_token = adds
    return made


@pytest.mark.parametrize("adds", [True, False])
def test_a_tokenizer_that_adds_a_first_token_adds_none_to_windows(tokenizer, adds):
    for start in (None, 0):
        own = begun(adds)
        assert torch.equal(windows(own, pico.documents(3), length=12, start=start),
                           windows(tokenizer, pico.documents(3), length=12, start=start))
        assert torch.equal(pack(own, parts(), length=12, seed=3, start=start).ids_ST,
                           pack(tokenizer, parts(), length=12, seed=3, start=start).ids_ST)


def test_a_first_token_in_the_text_is_not_doubled(tokenizer):
    """Documents made with a chat template bring it."""
    templated = [f"<s>{document}" for document in pico.documents(3)]
    ids_ST = windows(tokenizer, templated, length=12, start=0)
    assert torch.equal(ids_ST, windows(tokenizer, pico.documents(3), length=12, start=0))
    # of a family that needs none, the text stays as it is given
    assert int((windows(tokenizer, templated, length=12) == 0).sum()) > 0


@pytest.mark.parametrize("adds, start, expected", [(True, None, [0]), (True, 0, [0]), (False, 0, [0]),
                                                   (False, None, [])])
def test_a_prompt_has_its_first_token_once(adds, start, expected):
    """Llama's tokenizer adds it, GPT-2's does not, Gemma must have it."""
    own = begun(adds)
    text_ids = own("the council", add_special_tokens=False).input_ids
    assert prompt_ids(own, "the council", start=start).tolist() == [expected + text_ids]
    assert prompt_ids(own, "<s>the council", start=start).tolist() == [[0, *text_ids]]
    assert prompt_ids(own, "<s>the council", templated=True, start=start).tolist() == [[0, *text_ids]]
    bare = [] if start is None else [start]
    assert prompt_ids(own, "the council", templated=True, start=start).tolist() == [bare + text_ids]
