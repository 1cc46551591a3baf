"""Rule `plan` prints and writes the jobs, accelerator hours and disk of the grid."""
from pathlib import Path

from job import job

from kdp_core.base import store
from kdp_core.study import planner


def plan(work: dict, options: dict, outputs) -> str:
    """Make the plan from the models' configurations on this machine, write the plan, and return its table."""
    facts = {name: planner.facts_of(work["models"][name]["source"], Path("results", name, "dense"))
             for name in dict.fromkeys(point["model"] for point in work["points"])}
    sweep = planner.plan(work, facts, **options)
    store.write_json(outputs.record, sweep)
    store.write_text(outputs.table, planner.table(sweep))
    return planner.table(sweep)


if __name__ == "__main__":
    with job(snakemake):
        print(plan(snakemake.params.work, snakemake.params.options, snakemake.output))
