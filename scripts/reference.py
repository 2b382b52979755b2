"""Write docs/reference/ from the code: the command line, the Python API, and every part with its knobs.

With --check nothing is written, and the exit code is 1 if a page is stale.
"""

from __future__ import annotations

import dataclasses
import importlib
import inspect
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

__all__ = ["PAGES", "api_page", "cli_page", "commands", "main", "parts_page"]

FOLDER = Path(__file__).parents[1] / "docs" / "reference"
NOTE = "<!-- Written by scripts/reference.py from the code: change the code, then run `make reference`. -->\n"


def commands(prefix: str = "inkdrop", command: Any = None) -> Iterator[tuple[str, Any]]:
    """Every command of the command line that is not hidden: ("inkdrop data check", its click command)."""
    if command is None:
        from typer.main import get_command

        command = get_command(importlib.import_module("inkdrop.cli").app)
    yield prefix, command
    for name, child in sorted(getattr(command, "commands", {}).items()):
        if not child.hidden:
            yield from commands(f"{prefix} {name}", child)


def cli_page() -> str:
    """The command line: usage, arguments and options of each command."""
    parts = [
        "# Command line",
        "Every command answers `--help`. Exit codes: 0 done, 2 something the caller can put right.",
    ]
    for path, command in commands():
        parts += [f"## {path}", _prose(command.help or "")]
        shown = [p for p in command.params if not getattr(p, "hidden", False) and p.name not in _COMPLETION]
        arguments = " ".join(_placeholder(p) for p in shown if p.param_type_name == "argument")
        tail = "COMMAND ..." if getattr(command, "commands", {}) else f"[OPTIONS] {arguments}".strip()
        parts.append(f"```text\n{path} {tail}\n```")
        if shown:
            parts.append(_table(("option", "default", "what it does"), [_option(p) for p in shown]))
    return _page(parts)


_COMPLETION = {"help", "install_completion", "show_completion"}


def _placeholder(param: Any) -> str:
    name = (param.metavar or param.name).upper()
    return name if param.required else f"[{name}]"


def _option(param: Any) -> tuple[str, ...]:
    """One row of a command's table."""
    argument = param.param_type_name == "argument"
    flags = ", ".join([*param.opts, *param.secondary_opts])
    name = _placeholder(param) if argument else f"{flags} {param.metavar or ''}".strip()
    bare = param.default in (None, False, (), [], "") or callable(param.default)
    default = "required" if param.required else _default(param) if not bare or param.secondary_opts else ""
    return f"`{name}`", default, _prose(getattr(param, "help", None) or "")


def _default(param: Any) -> str:
    if param.secondary_opts:  # --clip/--no-clip, or neither
        return "" if param.default is None else f"`{(param.opts if param.default else param.secondary_opts)[0]}`"
    return f"`{getattr(param.default, 'value', param.default)}`"


def api_page() -> str:
    """The Python API: every public name with its signature and the first paragraph of its docstring."""
    inkdrop = importlib.import_module("inkdrop")
    parts = [
        "# Python API",
        f"The {len(inkdrop.__all__)} public names of `inkdrop`. Each is imported when it is first used.",
    ]
    for name in inkdrop.__all__:
        thing = getattr(inkdrop, name)
        parts.append(f"## {name}")
        signature = _signature(thing)
        if signature is not None:
            parts.append(f"```python\n{name}{signature}\n```")
        elif isinstance(thing, str):
            parts.append("A string.")
        if not isinstance(thing, str):
            parts.append(_prose((inspect.getdoc(thing) or "").split("\n\n")[0]))
    return _page(parts)


def _signature(thing: Any) -> str | None:
    """The signature with annotations as they are written, or None for what is not called."""
    if not callable(thing) or getattr(thing, "_is_protocol", False):
        return None
    if isinstance(thing, type) and issubclass(thing, Exception):
        return None
    try:
        signature = inspect.signature(thing)
    except (TypeError, ValueError):
        return None
    written, star = [], False
    for param in signature.parameters.values():
        if param.kind is param.KEYWORD_ONLY and not star:
            written.append("*")
        star = star or param.kind in (param.KEYWORD_ONLY, param.VAR_POSITIONAL)
        written.append(_parameter(param))
    hint = signature.return_annotation
    returns = "" if isinstance(thing, type) or hint is signature.empty else f" -> {_annotation(hint)}"
    line = f"({', '.join(written)}){returns}"
    return line if len(line) < 100 else "(\n" + "".join(f"    {w},\n" for w in written) + f"){returns}"


def _parameter(param: inspect.Parameter) -> str:
    stars = "*" * (1 if param.kind is param.VAR_POSITIONAL else 2 if param.kind is param.VAR_KEYWORD else 0)
    name = stars + param.name
    typed = name if param.annotation is param.empty else f"{name}: {_annotation(param.annotation)}"
    if param.default is param.empty:
        return typed
    return f"{typed} = {_value(param.default)}"


def _annotation(annotation: Any) -> str:
    if isinstance(annotation, str):
        return annotation
    forward = getattr(annotation, "__forward_arg__", None)
    return forward if isinstance(forward, str) else inspect.formatannotation(annotation)


def _value(default: Any) -> str:
    """A default as one would write it, the same on every machine."""
    if isinstance(default, dataclasses.Field) or repr(default) == "<factory>":
        return "..."
    if isinstance(default, Path):
        return f'Path("{default.as_posix()}")'
    if inspect.isfunction(default) or isinstance(default, type):
        return default.__name__
    return re.sub(r" at 0x[0-9a-f]+", "", repr(default))


def parts_page() -> str:
    """Every findable part, room by room, with its knobs."""
    find = importlib.import_module("inkdrop.find")
    parts = [
        "# Parts",
        "Everything that is found by name, with its knobs. On the command line a knob is set by `--set`, as in "
        "`--set sampler.eta=0.5`; in Python it is a keyword argument. `inkdrop list ROOM NAME` shows the same.",
    ]
    for room in find.ROOMS:
        parts.append(f"## {room}")
        for name, entry in find.listing(room).items():
            parts += [f"### {name} {{: #{room}-{name} }}", f"`{entry.module}` — {_prose(entry.summary)}"]
            function = find.find(room, name)
            said, written = described(function), inspect.signature(function).parameters
            rows = [_knob(written[knob], said.get(knob, "")) for knob in find.knobs(function)]
            if rows:
                parts.append(_table(("knob", "type", "default", "meaning"), rows))
    return _page(parts)


def described(function: Callable[..., Any]) -> dict[str, str]:
    """What the Args section of a docstring says of each argument."""
    section = re.search(r"^Args:\n(.*?)(?=^\S|\Z)", inspect.getdoc(function) or "", re.MULTILINE | re.DOTALL)
    entries = re.split(r"^    (?=\w+: )", section[1], flags=re.MULTILINE)[1:] if section else []
    return {e.split(": ", 1)[0]: e.split(": ", 1)[1] for e in entries}


def _knob(param: inspect.Parameter, said: str) -> tuple[str, ...]:
    default = "required" if param.default is param.empty else f"`{_value(param.default)}`"
    return f"`{param.name}`", f"`{_annotation(param.annotation)}`", default, _prose(said)


def _prose(text: str) -> str:
    """One paragraph that Markdown leaves alone: stars and underscores outside code are not emphasis."""
    joined = " ".join(text.split())
    return "".join(
        piece if i % 2 else re.sub(r"([*_<|])", r"\\\1", piece)
        for i, piece in enumerate(re.split(r"(`[^`]*`)", joined))
    )


def _table(head: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    cells = [head, ("---",) * len(head), *rows]
    return "\n".join("| " + " | ".join(re.sub(r"(?<!\\)\|", r"\\|", c) for c in row) + " |" for row in cells)


def _page(parts: list[str]) -> str:
    return NOTE + "\n" + "\n\n".join(p for p in parts if p) + "\n"


PAGES: dict[str, Callable[[], str]] = {"api.md": api_page, "cli.md": cli_page, "parts.md": parts_page}


def main(check: bool) -> int:
    """Write the pages, or with `check` say which are stale; 1 if any is."""
    FOLDER.mkdir(parents=True, exist_ok=True)
    stale = []
    for name, page in PAGES.items():
        path, text = FOLDER / name, page()
        if not path.exists() or path.read_text(encoding="utf-8") != text:
            stale.append(name)
            if not check:
                path.write_text(text, encoding="utf-8")
    if stale:
        print(
            f"reference: {'stale' if check else 'wrote'} {', '.join(stale)}"
            + ("; run `make reference`" if check else "")
        )
    return int(check and bool(stale))


if __name__ == "__main__":
    sys.exit(main("--check" in sys.argv[1:]))
