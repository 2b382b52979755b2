"""The demo's report: one HTML file, every figure of it from figures.json."""

from __future__ import annotations

import base64
import json
from pathlib import Path

from jinja2 import Environment, PackageLoader, StrictUndefined

from inkdrop.errors import BadData

__all__ = ["render"]


def render(out: Path) -> Path:
    """Write out/report.html from out/figures.json and out/pictures/*.png; returns its path.

    Raises:
        BadData: the figures or a picture are missing.
    """

    def picture(name: str) -> str:
        return "data:image/png;base64," + base64.b64encode((out / "pictures" / f"{name}.png").read_bytes()).decode()

    environment = Environment(
        loader=PackageLoader("inkdrop.demo", ""), autoescape=True, undefined=StrictUndefined, trim_blocks=True
    )
    try:
        figures = json.loads((out / "figures.json").read_text(encoding="utf-8"))
        text = environment.get_template("report.html.j2").render(f=figures, picture=picture, folder=out)
    except OSError as error:
        raise BadData(f"report: {error.filename} cannot be read; run inkdrop demo again") from None
    path = out / "report.html"
    path.write_text(text, encoding="utf-8")
    return path
