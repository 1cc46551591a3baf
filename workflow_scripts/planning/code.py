"""Hashes of the library code that a job runs, so that an edit of the library reruns the jobs that run it.

Snakemake sees the script of a rule, not what the script imports. Every rule takes such a hash as its param `code`.
"""
import ast
import hashlib
from functools import cache
from pathlib import Path

from planning.schema import ROOT, schema

TABLE = ROOT / "kdp_core" / "methods" / "__init__.py"


@cache
def _imports(path: Path) -> tuple[str, frozenset[Path]]:
    """A module's code without docstrings and comments, and the files of kdp_core that it imports.

    Of the table of methods only the functions count as its code: a new row must not rerun the others.
    """
    tree = _bare(ast.parse(path.read_text(encoding="utf-8")))
    found: set[Path] = set()
    for node in ast.walk(tree):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            names = [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
        found |= {file for name in names if name.startswith("kdp_core.") and (file := _file(name))}
    if path == TABLE:
        tree.body = [node for node in tree.body if not isinstance(node, ast.Import | ast.ImportFrom | ast.AnnAssign)]
    return ast.dump(tree), frozenset(found)


def _file(name: str) -> Path | None:
    base = ROOT.joinpath(*name.split("."))
    return next((file for file in (base.with_suffix(".py"), base / "__init__.py") if file.is_file()), None)


def _modules(method: str, steps: tuple[str, ...] | None = None) -> set[Path]:
    """The files that hold a method's functions (of some of its steps)."""
    parts = schema()["methods"][method]["properties"]
    return {_file(part["x-module"]) for name, part in parts.items() if steps is None or name in steps}


def _hash(start: Path, left_out: frozenset[Path] = frozenset()) -> str:
    todo, seen = [start], {}
    while todo:
        path = todo.pop()
        if path not in seen:
            seen[path], more = _imports(path)
            todo += [other for other in more if path != TABLE or other not in left_out]
    library = {str(path.relative_to(ROOT)): text for path, text in seen.items()
               if path.parent.name != "workflow_scripts"}
    return hashlib.sha256(repr(sorted(library.items())).encode()).hexdigest()[:16]


@cache
def of_script(script: str, method: str | None = None, steps: tuple[str, ...] | None = None) -> str:
    """Hash of the library code that a workflow script runs: the modules it imports, and theirs.

    Snakemake sees the script, not what it imports. As a param this reruns the rule when the library's code changes,
    and not when a comment or a docstring does. With a method (and some of its steps), modules of other methods that
    the table imports are left out.
    """
    others = {file for name in schema()["methods"] for file in _modules(name)}
    left_out = others - _modules(method, steps) if method else set()
    return _hash(ROOT / "workflow_scripts" / f"{script}.py", frozenset(left_out))


@cache
def of_part(method: str, step: str) -> str:
    """Hash of the library code of one step of a method, or of its search or compose."""
    return _hash(_file(schema()["methods"][method]["properties"][step]["x-module"]))


def of_blocks(method: str, sized: str) -> str:
    """Hash of the library code that selects blocks for a method with the stand-ins of the method `sized`."""
    return of_script("blocks") + of_part(method, "block") + function_code(schema()["methods"][sized]["x-params"])


@cache
def function_code(name: str) -> str:
    """Hash of one function, and of the constants it names and functions it calls in its module: no edit beside it
    counts."""
    module, function = name.rsplit(".", 1)
    tree = ast.parse(_file(module).read_text(encoding="utf-8"))
    known = {part: node for node in tree.body for part in _defined(node)}
    todo, seen = [function], {}
    while todo:
        part = todo.pop()
        if part not in seen:
            seen[part] = known[part]
            todo += [name for name in _used(known[part]) if name in known]
    text = [(part, ast.dump(_bare(node))) for part, node in sorted(seen.items())]
    return hashlib.sha256(repr(text).encode()).hexdigest()[:16]


def _used(node: ast.stmt) -> list[str]:
    """Constants that a statement names and functions that it calls; one that it only names is not run."""
    names = [part.id for part in ast.walk(node) if isinstance(part, ast.Name)]
    called = {part.func.id for part in ast.walk(node) if isinstance(part, ast.Call) and isinstance(part.func, ast.Name)}
    return [name for name in names if name in called or not name.islower()]


def _defined(node: ast.stmt) -> list[str]:
    """Names that a statement of a module gives a meaning."""
    if isinstance(node, ast.FunctionDef | ast.ClassDef):
        return [node.name]
    targets = node.targets if isinstance(node, ast.Assign) else [node.target] if isinstance(node, ast.AnnAssign) else []
    return [target.id for target in targets if isinstance(target, ast.Name)]


def _bare(tree: ast.AST) -> ast.AST:
    """The tree, its docstrings gone."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef) and ast.get_docstring(node) is not None:
            node.body = node.body[1:]
    return tree
