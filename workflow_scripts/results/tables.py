"""Rule `tables` writes every measured number, every fit, and a summary with one row for each model."""
from gather import fitted, points, table
from job import job

from kdp_core.base import store
from kdp_core.results import marks, summary, tables


def write_tables(grid: list[dict], steps: dict, comparisons: str, out: dict) -> None:
    """Gather all grid points and write the tables."""
    gathered = points(grid, steps)
    summarised = summary.summarise(gathered)
    store.write_text(out["scores"], summary.tidy(gathered).to_csv(index=False))
    store.write_text(out["summary"], summarised.to_csv(index=False))
    tested = table(comparisons)
    for form in ("csv", "md", "tex"):
        store.write_text(out[form], tables.render(summarised, form, caption="Pruned models beside the dense one.",
                                                  label="tab:summary", comparisons=tested, note=marks.NOTE))
    records = {(*keys.values(), getattr(record, "block", None)): (keys, record)
               for point in grid for keys, record in fitted(point, steps)}
    store.write_text(out["fits"], summary.fits(list(records.values())).to_csv(index=False) if records else "")


if __name__ == "__main__":
    with job(snakemake):
        write_tables(snakemake.params.grid, snakemake.params.steps, snakemake.input.comparisons,
                     dict(snakemake.output.items()))
