"""Rule `theory_tables` writes the measurements of both theorems as CSV and Markdown."""
from pathlib import Path

from job import job

from kdp_core.base import store
from kdp_core.results import theory


def write_tables(paths: list[str], csv: str, md: str) -> None:
    """Read the records and write the tables.

    The names of the model and the calibration set come from the path of each record.
    """
    records = {(Path(path).parts[-3], Path(path).parts[-2]): store.read(path) for path in paths}
    store.write_text(csv, theory.tidy(records).to_csv(index=False, lineterminator="\n"))
    store.write_text(md, theory.markdown(records))


if __name__ == "__main__":
    with job(snakemake):
        write_tables(snakemake.input, snakemake.output.csv, snakemake.output.md)
