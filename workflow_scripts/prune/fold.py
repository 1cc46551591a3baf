"""Rule `fold` writes the pruned checkpoint of one grid point."""
from pathlib import Path

from job import job

from kdp_core import methods
from kdp_core.base import provenance, store
from kdp_core.base.records import Plan, Selection
from kdp_core.model import shards
from kdp_core.prune import fold


def fold_point(method: str, dense: str, plan: str, fitted: list[str], links: bool, out: str, out_facts: str) -> None:
    """Make the plan of a point from its fitted records, and write the pruned checkpoint of this plan."""
    selection, records = store.read(plan), [store.read(path) for path in fitted]
    about = {**provenance.here(), "inputs": provenance.hashes({path: path for path in (plan, *fitted)})}
    store.write(out_facts, fold.fold(planned(method, selection, records), dense, out, about=about,
                                     shared=Path(dense).parent / shards.POOL if links else None))


def planned(method: str, selection: Selection, records: list) -> Plan:
    """The plan of a point.

    If the method has `compose`, the plan is made from the record of `compose`. Otherwise the plan is made from the
    records of all steps of all blocks.
    """
    entry = methods.method_of(method)
    if entry.compose:
        return methods.whole(method, selection, *records)
    steps = len(entry.steps)
    by_block = {block: records[index * steps:(index + 1) * steps] for index, block in enumerate(selection.blocks)}
    return methods.plan(method, selection, by_block)


if __name__ == "__main__":
    with job(snakemake):
        fold_point(snakemake.params.method, snakemake.input.dense, snakemake.input.plan, snakemake.input.fitted,
                   snakemake.params.links, snakemake.output.checkpoint, snakemake.output.pruned)
