"""Rule `report` writes one HTML page that needs no other file."""
import platform
import re
from pathlib import Path

import pandas as pd
from gather import table
from job import job

from kdp_core.base import provenance, store
from kdp_core.base.measurements import Agreement
from kdp_core.results import report
from kdp_core.results.report_models import FigureEntry

PEAK = re.compile(r"job INFO done in .*; peak memory (\d+) MB")
"""Pattern of the line in a job's log that gives the peak memory of the job (workflow_scripts/job.py)."""
PACKAGES = ("torch", "transformers", "lm_eval", "snakemake", "zarr", "numpy", "pandas", "matplotlib")


def frame(path: str) -> pd.DataFrame:
    """A CSV file as a frame; an empty file gives an empty frame."""
    return table(path) if Path(path).stat().st_size > 1 else pd.DataFrame()


def run_times(benchmarks: str, logs: str) -> pd.DataFrame:
    """The times in Snakemake's benchmark files and the peak memory in the jobs' logs, one row for each job."""
    paths = sorted(Path(benchmarks).rglob("*.tsv"))
    places = [path.relative_to(benchmarks) for path in paths]
    read = [pd.read_csv(path, sep="\t", usecols=["s", "max_rss"]).assign(rule=place.parts[0].removesuffix(".tsv"))
            for path, place in zip(paths, places, strict=True)]
    for frame, place in zip(read, places, strict=True):
        log = Path(logs, place).with_suffix(".log")
        if log.exists() and (found := PEAK.findall(log.read_text(encoding="utf-8"))):
            frame["max_rss"] = float(found[-1])
    return pd.concat(read, ignore_index=True) if read else pd.DataFrame(columns=["rule", "s", "max_rss"])


def versions(threads: int) -> dict[str, str]:
    """The versions of the packages on which numbers depend, the state of the code, the machine and its threads."""
    git = provenance.git_state()
    code = {"kdp, commit": git["commit"] + " with changes" * git["changed"]} if git else {}
    return {"machine": platform.machine(), "threads": str(threads), **provenance.versions(PACKAGES),
            **code}


def expectations(points: list[dict[str, str]], paths: list[str]) -> dict[str, list[tuple[str, str]]]:
    """Model -> one pair for each of its pruned models: a description, and the sentence about the expected
    generation."""
    found: dict[str, list[tuple[str, str]]] = {}
    for point, path in zip(points, paths, strict=True):
        words = f"{point['method']}, {point['calib']}, ratio {point['ratio']}, K max {point['k_max']}"
        found.setdefault(point["model"], []).append((words, store.read(path).sentence))
    return found


def agreements(paths: list[str]) -> dict[str, list[tuple[str, Agreement]]]:
    """Model -> its comparisons of searches, each as a pair: calibration set and ratio as a text, and the comparison."""
    found: dict[str, list[tuple[str, Agreement]]] = {}
    for path in map(Path, paths):
        words = f"{path.parts[-2]}, ratio {path.stem.removeprefix('agreement-r')}"
        found.setdefault(path.parts[-3], []).append((words, store.read(path)))
    return found


def write_report(inputs, params, threads: int, out: str) -> None:
    """Write tables, figures and the configuration into the page."""
    answered = list(inputs.get("answers") or [])
    entries = [FigureEntry(entry["title"], entry["caption"], entry["rule"], path, f"figures/{entry['name']}",
                           entry["name"].split("/")[0] if "/" in entry["name"] else "")
               for entry, path in zip(params.figures, inputs.figures, strict=True)]
    store.write_text(out, report.build(
        summary=frame(inputs.summary), scores=frame(inputs.scores), figures=entries,
        fits=frame(inputs.fits), comparisons=frame(inputs.comparisons), config_yaml=params.config_yaml,
        expectations=expectations(params.expected, inputs.get("expectations", [])),
        agreements=agreements(inputs.get("agreements", [])),
        versions=versions(threads), seeds=params.seeds, refused=params.refused,
        benchmarks=run_times("results/benchmarks", "results/logs"),
        answers={name_of(path, answered): store.read(path) for path in answered}))


def name_of(path: str, among: list[str]) -> str:
    """The name of the model whose folder contains `path`.

    The name includes the calibration set if `among` has several sets.
    """
    model, calib = Path(path).parts[-3:-1]
    return f"{model}, {calib}" if len({Path(one).parts[-2] for one in among}) > 1 else model


if __name__ == "__main__":
    with job(snakemake):
        write_report(snakemake.input, snakemake.params, snakemake.threads, snakemake.output[0])
