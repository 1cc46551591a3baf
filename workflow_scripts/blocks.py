"""Rule `blocks`: the blocks that one grid point replaces."""
from job import job

from kdp_core.base import store
from kdp_core.methods import method_of


def select_blocks(basis: str, facts: str, grid: dict, row: dict, sized_as: dict, out: str) -> None:
    """Count the stand-ins of the row `sized_as` and select blocks by the method's own rule; `basis` holds what it
    judges by, a similarity or a search."""
    facts = store.read(facts)
    module_params = method_of(sized_as["method"]).module_params(facts, sized_as["options"])
    selection = method_of(row["method"]).select(store.read(basis), facts, module_params=module_params, **grid,
                                                **row["options"])
    store.write(out, selection)


if __name__ == "__main__":
    with job(snakemake):
        select_blocks(snakemake.input.basis, snakemake.input.facts, snakemake.params.grid, snakemake.params.row,
                      snakemake.params.sized_as, snakemake.output[0])
