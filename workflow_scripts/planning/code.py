"""Hashes of the library code that a job runs, so that an edit of the library reruns the jobs that run it.

Snakemake sees the script of a rule, not what the script imports. Every rule therefore has such a hash as its param
`code`. It covers all modules of kdp_core that the script imports, directly or not, without comments and docstrings.

A script that takes a function from the table of methods imports, by `kdp_core.methods`, the files of all methods. There
the hash covers the modules of the functions that the job runs instead, so that an edit of one method, or a new one,
reruns no job of another.
"""
import ast
import hashlib
from functools import cache
from pathlib import Path

from planning.schema import ROOT, schema

OWN = ("job", "planning")
"""What scripts share about how jobs run; no result depends on it."""


@cache
def of_script(script: str, functions: tuple[str, ...] | None = None) -> str:
    """Hash of the library code of a workflow script, which is named with its folder, as `results/tables`.

    `functions` names the functions of methods that the job runs, as module.name. None stands for those of all methods.
    """
    start = [ROOT / "workflow_scripts" / f"{script}.py"]
    seen = _closure([*start, *(_file(name.rpartition(".")[0]) for name in functions or ())])
    if functions is None and _table() in seen:
        seen = _closure([*start, *_method_files()])
    library = sorted((str(path.relative_to(ROOT)), _parsed(path)[0]) for path in seen if path not in start)
    return hashlib.sha256(repr((library, functions)).encode()).hexdigest()[:16]


def of_method(script: str, method: str, *parts: str) -> str:
    """Hash of the library code of a script that runs some parts of a method.

    A part is `block`, a step, `search`, `compose`, `module` or `module_params`; one that the method lacks is ignored.
    """
    functions = schema()["methods"][method]["x-functions"]
    return of_script(script, tuple(functions[part] for part in parts if part in functions))


def of_figure(module: str) -> str:
    """Hash of the library code that draws the figures of a module of kdp_core/figures, which no script imports."""
    return of_script("figures/figure", (f"{module}.FIGURES",))


def of_blocks(method: str, sized: str) -> str:
    """Hash of the library code that selects blocks for a method and counts the stand-ins of the method `sized`."""
    functions = [schema()["methods"][name]["x-functions"] for name in (method, sized)]
    return of_script("methods/blocks", (functions[0]["block"], functions[1]["module_params"]))


def _closure(start: list[Path]) -> set[Path]:
    """These files and all that they import, directly or not; from the table of methods, no method is followed."""
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
    """The files of methods: those in the folder of the table, and in its folders, without a leading underscore."""
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
            # a module of the package by its own file, anything else by the package's
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
    """The tree without docstrings and other statements that are only a text."""
    for node in ast.walk(tree):
        if isinstance(body := getattr(node, "body", None), list):
            node.body = [one for one in body if not (isinstance(one, ast.Expr) and isinstance(one.value, ast.Constant)
                                                     and isinstance(one.value.value, str))]
    return tree
