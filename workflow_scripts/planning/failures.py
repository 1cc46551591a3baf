"""Prints the error messages of failed jobs as the last lines of a run, below snakemake's own output."""
import atexit
import re
import sys
from pathlib import Path

_LOG = re.compile(r"^\s*log: (?P<path>\S+).*\(check log file\(s\) for error details\)", re.MULTILINE)
_ERROR = re.compile(r"^(?:[a-z_][\w]*\.)*(?P<error>[A-Z]\w*: .+)$")


def say_last(line: str) -> None:
    """Print a line when the process ends.

    The line is printed at the end of the process, because snakemake prints more lines after `onerror` and after a
    refused config.
    """
    atexit.register(print, line, file=sys.stderr, flush=True)


def reasons(logs: list[str]) -> list[str]:
    """One line for each failed job, with the job's log and the last error in this log.

    The logs of failed jobs are found in snakemake's own logs.
    """
    text = "".join(Path(log).read_text(encoding="utf-8", errors="replace") for log in logs if Path(log).is_file())
    found = []
    for path in dict.fromkeys(match["path"].rstrip(",") for match in _LOG.finditer(text)):
        lines = Path(path).read_text(encoding="utf-8", errors="replace").splitlines() if Path(path).is_file() else []
        # an error may have several lines, so the last line with the beginning of an error is used
        errors = [match["error"] for line in lines if (match := _ERROR.match(line))]
        found += [f"{Path(path).parent.name}: {errors[-1]} (whole trace: {path})"] if errors else []
    return found
