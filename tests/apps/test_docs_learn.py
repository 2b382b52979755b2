"""The learning path, executed: every python block of a page in order, and what it prints is what the page says."""

from __future__ import annotations

import contextlib
import io
import re
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
PAGES = sorted((ROOT / "docs" / "learn").glob("*.md"))
BLOCK = re.compile(r"^```python\n(.*?)^```\n(?:\n^```text\n(.*?)^```\n)?", re.MULTILINE | re.DOTALL)


def test_the_path_is_there() -> None:
    assert [page.name for page in PAGES] == ["1-noise.md", "2-targets.md", "3-sampling.md", "4-guidance.md"]


@pytest.mark.parametrize("page", [*PAGES, ROOT / "docs/guides/conditioning.md"], ids=lambda page: page.stem)
def test_a_page_runs_and_prints_what_it_says(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks share their names, as in a reader's session, and leave no file behind."""
    monkeypatch.chdir(tmp_path)
    text = page.read_text(encoding="utf-8")
    blocks = list(BLOCK.finditer(text))
    assert len(blocks) == text.count("```python")
    session: dict[str, Any] = {"__name__": page.stem}
    for block in blocks:
        line = text.count("\n", 0, block.start()) + 1
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            exec(compile("\n" * line + block[1], str(page), "exec"), session)  # noqa: S102
        assert printed.getvalue() == (block[2] or ""), f"{page.name}, the block of line {line}"
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_a_block_is_short_and_its_links_lead_somewhere(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    assert all(len(block[1].splitlines()) <= 20 for block in BLOCK.finditer(text))
    for link in re.findall(r"\]\(([^)#: ]+\.md)\)", text):
        assert (page.parent / link).exists(), link
