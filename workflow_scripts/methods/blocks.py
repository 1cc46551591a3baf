"""Rule `blocks` selects the blocks that one grid point replaces."""
from job import job

from kdp_core.base import store
from kdp_core.methods import method_of


def select_blocks(basis: str, facts: str, grid: dict, variant: dict, sized_as: dict, out: str) -> None:
    """Select blocks by the method's own rule.

    `sized_as` names the method and the options that determine the number of parameters of the stand-ins. `basis` is the
    path of the record from which the method selects the blocks: a similarity or a search.
    """
    facts = store.read(facts)
    module_params = method_of(sized_as["method"]).module_params(facts, sized_as["options"])
    selection = method_of(variant["method"]).select(store.read(basis), facts, module_params=module_params, **grid,
                                                    **variant["options"])
    store.write(out, selection)


if __name__ == "__main__":
    with job(snakemake):
        select_blocks(snakemake.input.basis, snakemake.input.facts, snakemake.params.grid, snakemake.params.variant,
                      snakemake.params.sized_as, snakemake.output[0])
