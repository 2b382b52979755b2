"""README, executed verbatim: its commands and its Python, in order, in one empty folder.

Fenced blocks marked `bash` (commands), `console` (commands after "$ ", with their output) and `python` are run; blocks
marked `text` are not. Lines that fetch or install (git clone, make, pip, venv) are left out: CI does what they say.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).parents[2]
FENCE = re.compile(r"^```(\w+)[^\n]*\n(.*?)^```$", re.MULTILINE | re.DOTALL)
INSTALLS = re.compile(r"(git clone|make|cd|pip3? install|(\S*/)?python3? -m (pip|venv)|source|\. )\b")


class Block(NamedTuple):
    line: int
    language: str
    code: str


def blocks(text: str) -> list[Block]:
    """The fenced blocks that are to be run, without the lines that install."""
    found = []
    for match in FENCE.finditer(text):
        language, code = match[1], match[2]
        if language == "console":
            code = "\n".join(line[2:] for line in code.splitlines() if line.startswith("$ "))
        if language in ("bash", "console"):
            joined = re.sub(r"\\\n\s*", "", code)
            code = "\n".join(line for line in joined.splitlines() if not INSTALLS.match(line))
            language = "bash"
        if language in ("bash", "python") and code.strip():
            found.append(Block(text.count("\n", 0, match.start()) + 1, language, code))
    return found


def test_the_blocks_of_a_document_are_found() -> None:
    text = (
        "# A\n```bash\ngit clone x\nmake demo\ninkdrop a \\\n  --b c\n```\n```text\nno\n```\n"
        "```console\n$ inkdrop list\nddim\n```\n```python title='x'\nprint(1)\n```\n```bash\npip install inkdrop\n```\n"
    )
    assert blocks(text) == [
        Block(2, "bash", "inkdrop a --b c"),
        Block(11, "bash", "inkdrop list"),
        Block(15, "python", "print(1)\n"),
    ]


@pytest.mark.app
def test_readme_works(tmp_path: Path) -> None:
    folder = Path(sys.executable).parent
    assert (folder / "inkdrop").exists(), f"no inkdrop in {folder}; try: pip install -e ."
    env = os.environ | {"PATH": f"{folder}{os.pathsep}{os.environ['PATH']}", "COLUMNS": "100", "TERM": "dumb"}
    found = blocks((ROOT / "README.md").read_text(encoding="utf-8"))
    assert {block.language for block in found} == {"bash", "python"}
    for block in found:
        command = (
            ["bash", "-euo", "pipefail", "-c"] if block.language == "bash" else [sys.executable, "-W", "error", "-c"]
        )
        done = subprocess.run(
            [*command, block.code],
            cwd=tmp_path,
            env=env,
            capture_output=True,
            text=True,
            timeout=600,
            stdin=subprocess.DEVNULL,
        )
        assert done.returncode == 0, f"README.md:{block.line}\n{block.code}\n{done.stdout}\n{done.stderr}"
