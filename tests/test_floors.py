"""Law 9, the house: floors, line budget, public names, sizes, what is forbidden, and documents that stay true."""

from __future__ import annotations

import ast
import os
import re
import resource
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

import line_budget

ROOT = Path(__file__).parents[1]
HOUSE = ROOT / "src" / "inkdrop"
MODULES = sorted(HOUSE.rglob("*.py"))
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
EDITS = ("inpaint", "outpaint", "img2img", "invert", "interpolate", "vary", "restore")
COMMANDS = (
    *(
        "",
        "demo",
        "train",
        "resume",
        "sample",
        "eval",
        "compare",
        "classifier",
        "autoencoder",
        "ema",
        "show",
        "list",
        "data",
        "data check",
        "edit",
        "hub",
        "hub read",
        "hub write",
    ),
    *(f"edit {name}" for name in EDITS),
)
SCREEN = {"COLUMNS": "100", "TERM": "dumb", "NO_COLOR": "1"}


def ident(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), filename=str(path))


def run(*command: str, **env: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, capture_output=True, text=True, env=os.environ | env, cwd=ROOT, timeout=240)


def python(code: str, **env: str) -> str:
    done = run(sys.executable, "-c", code, **env)
    assert done.returncode == 0, done.stderr
    return done.stdout


# ---- floors and sizes --------------------------------------------------------------------------------------------


def test_imports_go_down() -> None:
    done = run(str(Path(sys.executable).with_name("lint-imports")), "--no-cache", **SCREEN)
    assert done.returncode == 0, done.stdout + done.stderr
    kept = re.search(r"Contracts: (\d+) kept, 0 broken", done.stdout)
    assert kept is not None
    assert int(kept[1]) == len(PYPROJECT["tool"]["importlinter"]["contracts"])


def test_every_folder_of_modules_is_a_package() -> None:
    """The linter of floors sees packages only."""
    folders = {path.parent for path in MODULES}
    assert [ident(folder) for folder in sorted(folders) if not (folder / "__init__.py").exists()] == []


@pytest.mark.parametrize("path", [p for p in MODULES if p.parent == HOUSE / "core"], ids=ident)
def test_core_is_tensors_and_mathematics(path: Path) -> None:
    """No nn.Module, no printing, and of inkdrop only core itself and the errors."""
    for node in ast.walk(tree(path)):
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import | ast.ImportFrom) else []
        origin = node.module or "" if isinstance(node, ast.ImportFrom) else ""
        for name in [f"{origin}.{name}".lstrip(".") for name in names]:
            assert not name.startswith("torch.nn"), f"imports {name}"
            if name.startswith("inkdrop"):
                assert name.startswith(("inkdrop.core.", "inkdrop.errors.")), f"imports {name}"
        if isinstance(node, ast.Attribute):
            assert node.attr != "Module", f"line {node.lineno}: an nn.Module"
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            assert node.func.id not in ("print", "open"), f"line {node.lineno}: {node.func.id}"


def test_nothing_in_the_house_imports_its_roof() -> None:
    """`from inkdrop import x` of a public name would go round the floors."""
    rooms = {path.stem for path in HOUSE.iterdir()} - {"__init__"}
    for path in MODULES:
        for node in ast.walk(tree(path)):
            if isinstance(node, ast.ImportFrom) and node.module == "inkdrop":
                assert {alias.name for alias in node.names} <= rooms | {"__version__"}, f"{ident(path)}:{node.lineno}"
            if isinstance(node, ast.Import) and path.name != "cli.py":
                assert "inkdrop" not in {alias.name for alias in node.names}, f"{ident(path)}:{node.lineno}"


def test_core_is_small(capsys: pytest.CaptureFixture[str]) -> None:
    assert line_budget.main() == 0, capsys.readouterr()


def test_the_line_count_leaves_out_what_is_not_code(tmp_path: Path) -> None:
    path = tmp_path / "module.py"
    path.write_text(
        '"""Two\nlines."""\n\n# a comment\nx = 1  # beside code\n\n\ndef f():\n    """One."""\n    return """a\nb"""\n'
    )
    assert line_budget.count(path) == 4  # x, def, and a string of two lines that is a value


@pytest.mark.parametrize("path", [*MODULES, *sorted((ROOT / "scripts").glob("*.py"))], ids=ident)
def test_files_and_functions_can_be_read_in_one_sitting(path: Path) -> None:
    assert len(path.read_text(encoding="utf-8").splitlines()) <= 400
    nodes = [node for node in ast.walk(tree(path)) if isinstance(node, ast.FunctionDef)]
    assert [f"{node.name}: {size} lines" for node in nodes if (size := lines_without_docstring(node)) > 60] == []


def lines_without_docstring(node: ast.FunctionDef) -> int:
    """Lines are never saved by cutting a docstring."""
    first = node.body[0]
    own = ast.get_docstring(node) is not None
    return (node.end_lineno or 0) - node.lineno + 1 - ((first.end_lineno or 0) - first.lineno + 1 if own else 0)


@pytest.mark.parametrize("path", sorted((ROOT / "examples").glob("*.py")), ids=ident)
def test_examples_are_short(path: Path) -> None:
    assert len(path.read_text(encoding="utf-8").splitlines()) <= 80


# ---- what is forbidden -------------------------------------------------------------------------------------------

UNSAFE_IMPORTS = {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "marshal", "shelve"}
UNSAFE_CALLS = {"eval", "exec", "compile", "__import__", "torch.load", "torch.save", "os.system", "torch.nan_to_num"}


def forbidden(code: ast.Module) -> Iterator[str]:
    """What could run code from a file, or hide a wrong number."""
    for node in ast.walk(code):
        if isinstance(node, ast.Import | ast.ImportFrom):
            origins = [node.module or ""] if isinstance(node, ast.ImportFrom) else [a.name for a in node.names]
            yield from (f"line {node.lineno}: import {o}" for o in origins if o.split(".")[0] in UNSAFE_IMPORTS)
        if isinstance(node, ast.ImportFrom) and node.module in ("torch", "os"):
            yield from (
                f"line {node.lineno}: {a.name}" for a in node.names if f"{node.module}.{a.name}" in UNSAFE_CALLS
            )
        if isinstance(node, ast.Call):
            name = ast.unparse(node.func)
            tensors_only = name == "torch.load" and any(key.arg == "weights_only" for key in node.keywords)
            if (name in UNSAFE_CALLS and not tensors_only) or name.endswith(".nan_to_num"):
                yield f"line {node.lineno}: {name}"
            for key in node.keywords:
                allowed = {"allow_pickle": False, "weights_only": True, "shell": False}
                if key.arg in allowed and getattr(key.value, "value", None) is not allowed[key.arg]:
                    yield f"line {node.lineno}: {key.arg}={ast.unparse(key.value)}"


@pytest.mark.parametrize("path", MODULES, ids=ident)
def test_no_file_can_run_code(path: Path) -> None:
    assert list(forbidden(tree(path))) == []


@pytest.mark.parametrize(
    "code",
    [
        "import pickle",
        "from dill import loads",
        "torch.load(path)",
        "torch.load(path, weights_only=False)",
        "torch.load(path, weights_only=flag)",
        "from torch import load",
        "np.load(path, allow_pickle=True)",
        "f(weights_only=False)",
        "eval('1')",
        "exec(source)",
        "x.nan_to_num()",
    ],
)
def test_what_is_forbidden_is_found(code: str) -> None:
    assert list(forbidden(ast.parse(code))) != []


def test_what_is_allowed_is_not_forbidden() -> None:
    assert (
        list(forbidden(ast.parse("net.eval()\nnp.load(path, allow_pickle=False)\nsafetensors.torch.load_file(path)")))
        == []
    )


# ---- names -------------------------------------------------------------------------------------------------------


def isort_style(name: str) -> tuple[int, list[tuple[str, int]]]:
    """CONSTANTS, then Classes, then functions, numbers by their value, as ruff sorts __all__ (RUF022)."""
    parts = [(text, int(digits or 0)) for text, digits in re.findall(r"(\D*)(\d*)", name)]
    return (0 if name.isupper() else 1 if name[0].isupper() else 2, parts)


@pytest.mark.parametrize("path", [p for p in MODULES if p.name != "__main__.py"], ids=ident)
def test_every_module_says_what_is_public(path: Path) -> None:
    body = tree(path).body
    public = {
        node.name for node in body if isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_")
    }
    lists = [n.value for n in body if isinstance(n, ast.Assign) and ast.unparse(n.targets[0]) == "__all__"]
    if not public and not lists:
        return
    assert len(lists) == 1, "needs one __all__"
    declared = ast.literal_eval(lists[0])
    assert declared == sorted(set(declared), key=isort_style)
    if path != HOUSE / "__init__.py":
        assert set(declared) >= public & set(declared), declared
        unknown = set(declared) - public - {n.id for n in ast.walk(tree(path)) if isinstance(n, ast.Name)}
        assert unknown == set(), "in __all__ but not in the module"


def test_the_public_names_are_few_sorted_and_real() -> None:
    import inkdrop

    assert list(inkdrop.__all__) == sorted(inkdrop.__all__, key=isort_style)
    assert 0 < len(inkdrop.__all__) <= 40
    assert [name for name in inkdrop.__all__ if not hasattr(inkdrop, name)] == []
    assert set(inkdrop.__all__) <= set(dir(inkdrop))
    with pytest.raises(AttributeError, match="no_such_name"):
        inkdrop.no_such_name  # noqa: B018


# ---- quick to start ----------------------------------------------------------------------------------------------

HEAVY = "torch numpy PIL matplotlib scipy safetensors"
ASK_HELP = f"""
import sys
from inkdrop.cli import main
sys.argv = ["inkdrop", *sys.argv[1:], "--help"]
try:
    main()
except SystemExit as end:
    assert not end.code, end.code
heavy = [name for name in {HEAVY.split()!r} if name in sys.modules]
assert not heavy, f"--help imports {{', '.join(heavy)}}"
"""


@pytest.mark.parametrize("command", COMMANDS)
def test_help_fits_a_screen_and_starts_without_torch(command: str) -> None:
    done = run(sys.executable, "-c", ASK_HELP, *command.split(), **SCREEN)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.strip().splitlines()
    assert "Usage" in done.stdout
    assert len(lines) <= 50
    assert max(map(len, lines)) <= 100


def test_the_commands_are_those_of_the_list_above() -> None:
    code = "import reference; print(*(path for path, _ in reference.commands()), sep='\\n')"
    found = python(code, PYTHONPATH=str(ROOT / "scripts")).split("\n")
    assert set(found) - {""} == {f"inkdrop {command}".strip() for command in COMMANDS}


def test_importing_inkdrop_imports_nothing_else() -> None:
    code = (
        "import sys, inkdrop; print(*sorted({name.split('.')[0] for name in sys.modules} - {*sys.stdlib_module_names}))"
    )
    own = {"inkdrop", "__main__", "sitecustomize", "usercustomize"}
    assert [name for name in python(code).split() if name not in own and not name.startswith("_")] == []


@pytest.mark.parametrize(
    "code", ["import inkdrop", "import sys; sys.argv[1:] = ['--help']; from inkdrop.cli import main; main()"]
)
def test_starting_takes_at_most_300_ms(code: str) -> None:
    """Beyond Python's own start, in CPU time, so that a busy machine does not count; the best of three."""

    def spent() -> float:
        used = resource.getrusage(resource.RUSAGE_CHILDREN)
        return used.ru_utime + used.ru_stime

    def best(program: str) -> float:
        times = []
        for _ in range(3):
            before = spent()
            run(sys.executable, "-c", program, **SCREEN)
            times.append(spent() - before)
        return min(times)

    assert best(code) - best("pass") <= 0.3


# ---- documents that stay true ------------------------------------------------------------------------------------


def test_the_generated_reference_is_fresh() -> None:
    done = run(sys.executable, str(ROOT / "scripts" / "reference.py"), "--check")
    assert done.returncode == 0, done.stdout + done.stderr


def normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def test_every_dependency_is_pinned() -> None:
    text = (ROOT / "constraints.txt").read_text(encoding="utf-8")
    lines = [line for line in text.splitlines() if line and not line.startswith("#")]
    assert [line for line in lines if not re.fullmatch(r"[A-Za-z0-9._-]+==[A-Za-z0-9.]+", line)] == []
    pinned = {normal(line.split("==")[0]) for line in lines}
    project = PYPROJECT["project"]
    wanted = [*project["dependencies"], *(w for extra in project["optional-dependencies"].values() for w in extra)]
    assert {normal(re.split(r"[<>=!~; \[]", want)[0]) for want in wanted} <= pinned


def test_the_changelog_knows_this_version() -> None:
    import inkdrop

    text = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    assert re.search(r"^## \[Unreleased\]", text, re.MULTILINE)
    assert re.search(rf"^## \[{re.escape(inkdrop.__version__)}\]", text, re.MULTILINE)
