"""Hashes of the library code that a job runs, so that an edit of the library reruns the jobs that use the edited code.

Snakemake reads the script of a rule, but not the modules that the script imports. Every rule therefore has the hash of
its library code as its param `code`. The hash covers all modules of kdp_core that the script imports, directly or
indirectly, without comments and docstrings.

A script that uses the table of methods imports `kdp_core.methods`, and through it the files of all methods. If a script
uses the table of methods, the hash covers only those files of methods whose functions the job runs. If a method is
edited or added, the jobs of other methods therefore do not run again.
"""
import ast
import contextlib
import hashlib
import json
import os
import sys
from functools import cache
from pathlib import Path

from planning.schema import ROOT, schema

OWN = ("job", "planning")
"""Modules that decide how jobs run; no result depends on them."""
KEPT = 8
"""Number of states of the code whose hashes are kept in the cache; the newest are kept."""


def of_script(script: str, functions: tuple[str, ...] | None = None) -> str:
    """Hash of the library code of a workflow script, whose name includes its folder, such as `results/tables`.

    `functions` lists the functions of methods that the job runs, each as module.name. If `functions` is None, the hash
    covers the files of all methods.
    """
    file, known = _cached()
    key = repr((script, functions))
    if key not in known:
        known[key] = _hash(script, functions)
        # where the checkout cannot be written, each start computes the hashes again
        with contextlib.suppress(OSError):
            _keep(file, known)
    return known[key]


def _hash(script: str, functions: tuple[str, ...] | None) -> str:
    start = [ROOT / "workflow_scripts" / f"{script}.py"]
    seen = _closure([*start, *(_file(name.rpartition(".")[0]) for name in functions or ())])
    if functions is None and _table() in seen:
        seen = _closure([*start, *_method_files()])
    library = sorted((str(path.relative_to(ROOT)), _parsed(path)[0]) for path in seen if path not in start)
    return hashlib.sha256(repr((library, functions)).encode()).hexdigest()[:16]


def of_method(script: str, method: str, *parts: str) -> str:
    """Hash of the library code of a script that runs the given parts of a method.

    A part is `block`, a step, `search`, `compose`, `module` or `module_params`; parts that the method lacks are
    ignored.
    """
    functions = schema()["methods"][method]["x-functions"]
    return of_script(script, tuple(functions[part] for part in parts if part in functions))


def of_figure(module: str) -> str:
    """Hash of the library code that draws the figures of a module of kdp_core/figures.

    No script has an import statement for the modules of figures, so this function computes their hashes.
    """
    return of_script("figures/figure", (f"{module}.FIGURES",))


def of_blocks(method: str, sized: str) -> str:
    """Hash of two parts of the library code: the selection of blocks by `method`, and the size of the stand-ins of
    `sized`."""
    functions = [schema()["methods"][name]["x-functions"] for name in (method, sized)]
    return of_script("methods/blocks", (functions[0]["block"], functions[1]["module_params"]))


@cache
def _cached() -> tuple[Path, dict[str, str]]:
    """The file of the hashes of the present code, and the hashes that it contains.

    Each start of Snakemake needs all hashes, and reading the syntax trees for them takes a second.
    """
    made = hashlib.sha256(sys.version.encode())
    for folder in (ROOT / "kdp_core", ROOT / "workflow_scripts"):
        for path in sorted(folder.rglob("*.py")):
            made.update(f"{path.relative_to(ROOT)}\0".encode() + path.read_bytes())
    file = ROOT / ".cache" / "code" / f"{made.hexdigest()[:16]}.json"
    return file, json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}


def _keep(file: Path, known: dict[str, str]) -> None:
    """Write the hashes. If several processes write, the last file remains; a hash that it lacks is computed again."""
    file.parent.mkdir(parents=True, exist_ok=True)
    made = file.with_suffix(f".{os.getpid()}.tmp")
    made.write_text(json.dumps(known), encoding="utf-8")
    os.replace(made, file)
    for old in sorted(file.parent.glob("*.json"), key=lambda path: path.stat().st_mtime, reverse=True)[KEPT:]:
        old.unlink(missing_ok=True)


def _closure(start: list[Path]) -> set[Path]:
    """The files in `start`, and all files that are imported by them directly or indirectly.

    The table of methods imports the files of all methods; these imports are not followed.
    """
    todo, seen, methods = list(start), set(), _method_files()
    while todo:
        path = todo.pop()
        if path not in seen:
            seen.add(path)
            todo += [other for other in _parsed(path)[1] if path != _table() or other not in methods]
    return seen


def _table() -> Path:
    return ROOT / "kdp_core" / "methods" / "__init__.py"


@cache
def _method_files() -> frozenset[Path]:
    """The files of methods: all files without a leading underscore in the folder of the table and in its subfolders."""
    return frozenset(path for path in _table().parent.rglob("*.py") if path != _table()
                     and not path.relative_to(_table().parent).parts[0].startswith("_"))


@cache
def _parsed(path: Path) -> tuple[str, frozenset[Path]]:
    """A module's code without docstrings and comments, and the files that it imports."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    found: set[Path | None] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {_file(alias.name) for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            # the imported name may be a module with its own file, or a name that the package's file defines
            found |= {_file(f"{node.module}.{alias.name}") or _file(node.module) for alias in node.names}
    return ast.dump(_bare(tree)), frozenset(found - {None})


def _file(name: str) -> Path | None:
    """The file of a module of the library or of the workflow scripts; None for any other module."""
    top, *inner = name.split(".")
    if top in OWN:
        return None
    base = ROOT.joinpath(top, *inner) if top == "kdp_core" else ROOT.joinpath("workflow_scripts", top, *inner)
    return next((file for file in (base.with_suffix(".py"), base / "__init__.py") if file.is_file()), None)


def _bare(tree: ast.AST) -> ast.AST:
    """The syntax tree without docstrings and without other statements that are only a string."""
    for node in ast.walk(tree):
        if isinstance(body := getattr(node, "body", None), list):
            node.body = [one for one in body if not (isinstance(one, ast.Expr) and isinstance(one.value, ast.Constant)
                                                     and isinstance(one.value.value, str))]
    return tree
