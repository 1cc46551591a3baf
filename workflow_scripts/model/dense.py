"""Rule `dense` fetches a model, converts it to a safetensors folder, and writes the model's facts for later stages."""
from pathlib import Path

from job import job

from kdp_core.base import store
from kdp_core.model import assets, checkpoints, intake, shards


def convert_model(entry: dict, cache: str, links: bool, out: str, out_facts: str) -> None:
    """Fetch, check and convert a model."""
    path = assets.fetch(entry["source"], sha256=entry.get("sha256"), cache=cache, check=intake.check_folder)
    facts = checkpoints.convert(path, out, dtype=entry.get("dtype", "float32"), source=entry["source"],
                                trust_remote_code=entry.get("trust_remote_code", False),
                                shared=Path(out).parent / shards.POOL if links else None)
    store.write(out_facts, facts)


if __name__ == "__main__":
    with job(snakemake):
        convert_model(snakemake.params.entry, snakemake.params.cache, snakemake.params.links,
                      snakemake.output.checkpoint, snakemake.output.facts)
