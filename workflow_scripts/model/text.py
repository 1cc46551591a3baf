"""Rule `text` fetches a text from its source and writes its documents as JSON lines."""
import json

from job import job

from kdp_core.base import store, texts
from kdp_core.model import assets


def fetch_text(entry: dict, cache: str, out: str) -> None:
    """Fetch a text, read its documents, and write each document as a JSON object on a line of its own."""
    source = assets.parse_source(entry["source"])
    if source.kind == "hf-data":
        documents = texts.read_hub_documents(
            source.name, revision=source.version, config=entry.get("config"), split=entry.get("split", "train"),
            field=entry.get("field", "text"), cache=cache, limit=entry.get("limit"))
    else:
        path = assets.fetch(entry["source"], sha256=entry.get("sha256"), cache=cache)
        documents = texts.read_documents(path, format=entry.get("format", "text"),
                                         encoding=entry.get("encoding", "utf-8"), field=entry.get("field", "text"))
    store.write_text(out, "".join(json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in documents))


if __name__ == "__main__":
    with job(snakemake):
        fetch_text(snakemake.params.entry, snakemake.params.cache, snakemake.output[0])
