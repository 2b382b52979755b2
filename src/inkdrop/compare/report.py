"""The report of a comparison: HTML in one file, and Markdown, every figure of both from compare.json."""

from __future__ import annotations

import base64
import re
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

__all__ = ["render"]


def render(out: Path, record: dict[str, Any]) -> Path:
    """Write out/report.html and out/report.md; returns the path of the first.

    Args:
        out: the comparison's folder, with its pictures.
        record: what compare.json holds.
    """

    def picture(name: str) -> str | None:
        file = out / "pictures" / f"{name}.png"
        return "data:image/png;base64," + base64.b64encode(file.read_bytes()).decode() if file.exists() else None

    for name, escape in (("report.md", False), ("report.html", True)):
        environment = Environment(
            loader=PackageLoader("inkdrop.compare", ""),
            autoescape=escape,
            undefined=StrictUndefined,
            trim_blocks=True,
            lstrip_blocks=True,
        )
        environment.filters |= {"share": _share, "plain": _plain}
        text = environment.get_template(f"{name}.j2").render(r=record, picture=picture)
        (out / name).write_text(text, encoding="utf-8")
    return out / "report.html"


def _share(value: float | None) -> str:
    return "–" if value is None else f"{value:.3f}"


def _plain(name: str) -> str:
    """A name in which Markdown finds no table, tag or emphasis."""
    return re.sub(r"([\\|<*`\[])", r"\\\1", name)
