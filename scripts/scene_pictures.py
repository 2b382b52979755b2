"""Draw the picture of docs/guides/text-to-image.md: samples of unseen prompts, the prompt under each, with its verdict.

    python scripts/scene_pictures.py runs/shapes docs/images/shapes-text.png

The prompts are the first of the benchmark's (bench/shapes_text.py), not chosen: two rows of single things, three of
pairs. The words of the prompt that the judge finds wrong are said in red below it.
"""

from __future__ import annotations

import sys
import textwrap
from pathlib import Path

import torch
from PIL import Image, ImageDraw, ImageFont

from inkdrop import load, sample
from inkdrop.core.noise import generator
from inkdrop.data.captions import combinations, text_of
from inkdrop.evals.scenes import Verdict, judge
from inkdrop.picture import image

COLUMNS, SCALE, GAP, LINES = 6, 4, 16, 3


def prompts(things: int, count: int) -> list[str]:
    """The first prompts of the benchmark."""
    scenes = combinations("test", things)
    return [text_of(scenes[i]) for i in generator(0, things, 0).permutation(len(scenes))[:count]]


def wrong(verdict: Verdict) -> str:
    """The fields that are not as said."""
    return ", ".join(name for name, value in verdict._asdict().items() if value is False)


def sheet(x: torch.Tensor, texts: list[str]) -> Image.Image:
    """Samples in rows, each with its prompt below."""
    side, font = x.shape[-1] * SCALE, ImageFont.load_default(13)
    cell = (side + GAP, side + 17 * (LINES + 1) + 4)
    rows = -(-len(x) // COLUMNS)
    made = Image.new("RGB", (GAP + COLUMNS * cell[0], GAP + rows * cell[1]), "white")
    pen = ImageDraw.Draw(made)
    for i, (one, text, verdict) in enumerate(zip(x, texts, judge(x, texts), strict=True)):
        left, top = GAP + i % COLUMNS * cell[0], GAP + i // COLUMNS * cell[1]
        made.paste(image(one).resize((side, side), Image.Resampling.NEAREST), (left, top))
        pen.rectangle((left - 1, top - 1, left + side, top + side), outline="#bbbbbb")
        lines = [(line, "black") for line in textwrap.wrap(text, 22)]
        lines += [(line, "#c02020") for line in textwrap.wrap(wrong(verdict), 22)]
        for row, (line, ink) in enumerate(lines):
            pen.text((left, top + side + 3 + 17 * row), line, fill=ink, font=font)
    return made


def main() -> None:
    """Write the picture."""
    run, out = Path(sys.argv[1]), Path(sys.argv[2])
    texts = prompts(1, 2 * COLUMNS) + prompts(2, 3 * COLUMNS)
    sheet(sample(load(run), len(texts), text=texts, seed=0), texts).save(out, optimize=True)


if __name__ == "__main__":
    main()
