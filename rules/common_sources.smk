"""Local files and folders that the configuration names, and that are missing on this machine.

Jobs may run on other machines, and a dry run runs no job. Only a run whose jobs run here is therefore refused.
"""

from planning import sources

SCORED_BY = ("score", "score_dense", "evaluate", "evaluate_dense")

if workflow.is_main_process:
    for line in sources.absent(config, sources.unfetched(config)):
        print(f"note: {line}", file=sys.stderr)


def refuse_absent():
    """Refuse a run whose jobs run here and read a file or a folder that is missing; no job has run yet."""
    if not workflow.is_main_process or workflow.non_local_exec or workflow.touch:
        return
    jobs = list(workflow.dag.needrun_jobs())
    read = [("models", job.wildcards.model) for job in jobs if job.rule.name == "dense"]
    read += [("texts", job.wildcards.text) for job in jobs if job.rule.name == "text"]
    found = sources.absent(config, read)
    if any(job.rule.name in SCORED_BY for job in jobs):
        found += sources.absent_folders(config)
    if found:
        failures.say_last(found[0])
        raise WorkflowError(found[0])
