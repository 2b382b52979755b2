"""Count the lines of code of inkdrop's core: no blanks, no comments, no docstrings."""

from __future__ import annotations

import ast
import sys
import tokenize
from pathlib import Path

__all__ = ["LIMIT", "ROOMS", "count", "main"]

LIMIT = 3000
ROOMS = ("core", "samplers", "guide", "losses", "denoiser.py", "drive.py", "find.py")
HOUSE = Path(__file__).parents[1] / "src" / "inkdrop"

_LAYOUT = {
    tokenize.COMMENT,
    tokenize.DEDENT,
    tokenize.ENCODING,
    tokenize.ENDMARKER,
    tokenize.INDENT,
    tokenize.NEWLINE,
    tokenize.NL,
}


def count(path: Path) -> int:
    """The number of lines on which a token of code stands; a string that is a statement by itself is a docstring."""
    with tokenize.open(path) as file:
        source = file.read()
    prose = {
        line
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)
        for line in range(node.lineno, (node.end_lineno or node.lineno) + 1)
    }
    code: set[int] = set()
    with path.open("rb") as binary:
        for token in tokenize.tokenize(binary.readline):
            if token.type not in _LAYOUT:
                code.update(range(token.start[0], token.end[0] + 1))
    return len(code - prose)


def main() -> int:
    """Print the lines of each room; 1 if there are too many, or a room is not there."""
    total = 0
    for room in ROOMS:
        path = HOUSE / room
        lines = sum(map(count, [path] if path.is_file() else path.rglob("*.py")))
        if not lines:
            print(f"line budget: no code in {path}; put the room's new place into ROOMS", file=sys.stderr)
            return 1
        print(f"  {room:12} {lines:5}")
        total += lines
    print(f"  {'in all':12} {total:5}  of less than {LIMIT}")
    return int(total >= LIMIT)


if __name__ == "__main__":
    sys.exit(main())
