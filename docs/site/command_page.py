"""The page on the command line, made from the signatures of its commands."""
import typing
from collections.abc import Callable
from pathlib import Path
from typing import Any

import typer
from config_page import escaped

from kdp.app import app

HEAD = """# Command line

`kdp` prunes one model and looks at checkpoints. `python -m kdp` is the same. Every error is one line, and
`kdp --trace COMMAND` shows where it arose. `kdp --install-completion` teaches your shell the commands and options.

This page is made from the signatures of the commands. `kdp COMMAND --help` shows the same in the terminal.
"""


WORDS = {str: "text", int: "whole number", float: "number", Path: "path", bool: "", list[str]: "text, several times",
         str | None: "text", int | None: "whole number"}
"""Annotation of an option -> the kind of value that the user gives."""


def page() -> str:
    """The whole page, as Markdown."""
    group: Any = typer.main.get_command(app)
    functions = {one.name or one.callback.__name__: one.callback for one in app.registered_commands if one.callback}
    commands = [command(name, one, functions[name]) for name, one in group.commands.items()]
    return "\n".join([HEAD, '<div class="options"></div>\n', *commands])


def command(name: str, one: Any, function: Callable[..., Any]) -> str:
    """The description of a command, with its arguments and options."""
    arguments = [param for param in one.params if param.param_type_name == "argument"]
    options = [param for param in one.params if param.param_type_name == "option" and param.name != "help"]
    usage = " ".join(["kdp", name, *(param.name.upper() if param.required else f"[{param.name.upper()}]"
                                     for param in arguments), *(["[OPTIONS]"] if options else [])])
    # line breaks within a paragraph of a docstring have no meaning
    said = "\n\n".join(" ".join(part.split()) for part in one.help.split("\n\n"))
    lines = [f"## kdp {name}\n", f"{escaped(said)}\n", f"    {usage}\n"]
    hints = typing.get_type_hints(function)
    if rows := [row(param, WORDS[hints[param.name]]) for param in [*arguments, *options]]:
        lines += ["| argument or option | value | default | meaning |", "|---|---|---|---|", *rows, ""]
    return "\n".join(lines)


def row(param: Any, words: str) -> str:
    """One line of the table of a command."""
    name = param.name.upper() if param.param_type_name == "argument" else "`, `".join(param.opts)
    least = "" if param.min is None else f", at least {param.min:g}"
    default = "" if not words or param.default in (None, [], ()) else f"`{param.default}`"
    default = "*required*" if param.required else default
    return f"| `{name}` | {words}{least} | {default} | {escaped(param.help or '')} |"
