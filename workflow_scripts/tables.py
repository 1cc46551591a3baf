"""Rule `tables`: every measured number, one row a model, and both for print."""
from gather import fitted, points, table
from job import job

from kdp_core.base import store
from kdp_core.results import tables


def write_tables(grid: list[dict], steps: dict, comparisons: str, out: dict) -> None:
    """Gather all grid points and write the tables."""
    gathered = points(grid, steps)
    summary = tables.summarise(gathered)
    store.write_text(out["scores"], tables.tidy(gathered).to_csv(index=False))
    store.write_text(out["summary"], summary.to_csv(index=False))
    tested = table(comparisons)
    for form in ("csv", "md", "tex"):
        store.write_text(out[form], tables.render(summary, form, caption="Pruned models beside the dense one.",
                                                  label="tab:summary", comparisons=tested, note=tables.NOTE))
    records = {(*keys.values(), getattr(record, "block", None)): (keys, record)
               for point in grid for keys, record in fitted(point, steps)}
    store.write_text(out["fits"], tables.fits(list(records.values())).to_csv(index=False) if records else "")


if __name__ == "__main__":
    with job(snakemake):
        write_tables(snakemake.params.grid, snakemake.params.steps, snakemake.input.comparisons,
                     dict(snakemake.output.items()))
