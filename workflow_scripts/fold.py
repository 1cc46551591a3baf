"""Rule `fold`: the pruned checkpoint of one grid point."""
from job import job

from kdp_core import methods
from kdp_core.base import store
from kdp_core.base.records import Plan, Selection
from kdp_core.prune import fold


def fold_point(method: str, dense: str, plan: str, fitted: list[str], out: str, out_facts: str) -> None:
    """Gather what was fitted, make the plan, fold."""
    selection, records = store.read(plan), [store.read(path) for path in fitted]
    store.write(out_facts, fold.fold(planned(method, selection, records), dense, out))


def planned(method: str, selection: Selection, records: list) -> Plan:
    """The plan of a point from its one composed record, or from those of every step, block by block."""
    row = methods.method_of(method)
    if row.compose:
        return methods.whole(method, selection, *records)
    steps = len(row.steps)
    by_block = {block: records[index * steps:(index + 1) * steps] for index, block in enumerate(selection.blocks)}
    return methods.plan(method, selection, by_block)


if __name__ == "__main__":
    with job(snakemake):
        fold_point(snakemake.params.method, snakemake.input.dense, snakemake.input.plan, snakemake.input.fitted,
                   snakemake.output.checkpoint, snakemake.output.pruned)
