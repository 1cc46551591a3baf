"""Rule `hidden`: hidden states of a dense model over its calibration sequences, streamed to Zarr."""
from job import job

from kdp_core import hidden, models, store


def extract_hidden(dense: str, tokens: str, out: str, dtype: str, device: str, options: dict) -> None:
    """Load the model and stream its states."""
    model = models.load_model(dense, device=device, dtype=dtype)
    hidden.extract(model, store.read(tokens), out, **options)


if __name__ == "__main__":
    with job(snakemake):
        extract_hidden(snakemake.input.dense, snakemake.input.tokens, snakemake.output[0], snakemake.params.dtype,
                       snakemake.params.device, snakemake.params.options)
