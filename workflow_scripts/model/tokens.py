"""Rule `tokens` packs the calibration sequences of one mix for one model."""
from job import job

from kdp_core.base import store, texts
from kdp_core.model import checkpoints
from kdp_core.model.families import first_token


def pack_tokens(dense: str, facts: str, documents: dict, calibration: dict, out: str) -> None:
    """Tokenise and pack the texts of a calibration mix."""
    parts = [texts.Part(name, texts.read_documents(documents[name], format="jsonl"), count)
             for name, count in calibration["mix"].items()]
    tokens = texts.pack(checkpoints.load_tokenizer(dense), parts, length=calibration["length"],
                        seed=calibration["seed"], vocabulary=store.read(facts).vocabulary,
                        start=first_token(checkpoints.config_of(dense)))
    store.write(out, tokens)


if __name__ == "__main__":
    with job(snakemake):
        pack_tokens(snakemake.input.dense, snakemake.input.facts,
                    dict(zip(snakemake.params.calibration["mix"], snakemake.input.texts, strict=True)),
                    snakemake.params.calibration, snakemake.output[0])
