"""The page on the library: it shows the public names of kdp_core with their signatures and docstrings."""
import ast
import inspect
from collections.abc import Callable
from typing import Any

import kdp_core

HEAD = """# Library

A notebook needs few names, and `kdp_core` has them. They are imported when they are first used. The package has types,
so a type checker sees the signatures.

This page is made from the signatures and docstrings.
"""

WIDE = 100
"""A signature with at least this number of characters is written on several lines."""


def page() -> str:
    """The whole page, as Markdown."""
    functions = [getattr(kdp_core, name) for name in sorted(kdp_core.__all__)]
    shown = [described(one) for one in functions if callable(one)]
    methods = ("## METHODS\n\nThe table of all methods: name → record. `kdp_core.METHODS[\"shortgpt\"].paper` says "
               "where a method was published. [The methods](../methods.md) have a page each.\n")
    return "\n".join([HEAD, *shown, methods])


def described(function: Callable[..., Any]) -> str:
    """A function with its signature, as its source writes it, and its docstring."""
    tree = ast.parse(inspect.getsource(function)).body[0]
    assert isinstance(tree, ast.FunctionDef)
    given, back = ast.unparse(tree.args), ast.unparse(tree.returns) if tree.returns else "None"
    one_line = f"{function.__name__}({given}) -> {back}"
    code = one_line if len(one_line) < WIDE else f"{function.__name__}(\n{_in_lines(tree.args)}) -> {back}"
    return f"## {function.__name__}\n\n```python\n{code}\n```\n\n{prose(function)}\n"


def _in_lines(arguments: ast.arguments) -> str:
    """The arguments of a function, one on each line."""
    alone = [ast.unparse(ast.arguments([], [one], None, [], [], None, [])) for one in arguments.args]
    alone += ["*"] * bool(arguments.kwonlyargs)
    alone += [ast.unparse(ast.arguments([], [], None, [one], [value], None, [])).removeprefix("*, ")
              for one, value in zip(arguments.kwonlyargs, arguments.kw_defaults, strict=True)]
    return "".join(f"    {one},\n" for one in alone)


def prose(function: Callable[..., Any]) -> str:
    """A docstring as Markdown: entries `name: meaning` become a list, and an example becomes a block of code."""
    lines, inside = [], False
    for line in (inspect.getdoc(function) or "").splitlines():
        head, colon, rest = line.partition(": ")
        if colon and head in inspect.signature(function).parameters:
            lines += ([] if inside or not lines or not lines[-1] else [""]) + [f"- `{head}`: {rest}"]
            inside = True
        else:
            # the line after a list is a paragraph of its own, unless the line continues the last entry
            lines += [""] if inside and line and not line.startswith("    ") else []
            inside = inside and line.startswith("    ")
            lines.append(line if not line.startswith((">>>", "...")) else f"    {line}")
    text = "\n".join(lines)
    return text.replace("\n    >>>", "\n\n    >>>", 1)
