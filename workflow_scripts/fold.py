"""Rule `fold`: the pruned checkpoint of one grid point."""
from job import job

from kdp_core import fold, methods, store


def fold_point(method: str, dense: str, plan: str, fitted: list[str], out: str, out_facts: str) -> None:
    """Gather the records of every block, make the plan, fold."""
    selection, steps = store.read(plan), len(methods.method_of(method).steps)
    records = [store.read(path) for path in fitted]
    by_block = {block: records[index * steps:(index + 1) * steps] for index, block in enumerate(selection.blocks)}
    store.write(out_facts, fold.fold(methods.plan(method, selection, by_block), dense, out))


if __name__ == "__main__":
    with job(snakemake):
        fold_point(snakemake.params.method, snakemake.input.dense, snakemake.input.plan, snakemake.input.fitted,
                   snakemake.output.checkpoint, snakemake.output.pruned)
