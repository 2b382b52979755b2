"""What is in a folder, zip or set of IDX files, and whether it can be trained on: `inkdrop data check PATH`."""

from __future__ import annotations

import hashlib
import shlex
import warnings
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np

from inkdrop.core.dataset import FEW
from inkdrop.data.columns import settings_for, table_of
from inkdrop.data.folder import HOLDOUT, divide
from inkdrop.data.form import Wish, infer, listing, suggested_size
from inkdrop.data.idx import idx, idx_files, read_idx
from inkdrop.data.images import Header, decode, is_image, scaled
from inkdrop.data.layout import Entry, Layout, arrange
from inkdrop.data.store import Problem, Store, open_store
from inkdrop.errors import BadArgument, BadData

__all__ = ["Survey", "survey"]


@dataclass(frozen=True)
class Survey:
    """What was found; every file was decoded.

    Attributes:
        path: the folder or zip.
        kind: what was recognised: "class folders", "metadata.jsonl", "IDX files".
        total: the number of images, readable or not.
        sizes: height×width -> how many readable images.
        modes: pixel format as the files say -> how many: "RGB", "P", "I;16", "npy float32".
        values: the least and the greatest value over all readable images, by the rules, in [-1, 1].
        classes: class name -> how many images, in the order of the labels.
        splits: "train" and "test" -> how many, with the default hold-out.
        unreadable: files that cannot be read, each with its reason.
        duplicates: groups of files with the same pixels.
        notes: what a person should know, one line each.
        command: how to train on it; "" if that is refused.
        reason: why training is refused, and what to do; "" if it is not.
        captions: how many rows of its table have a caption.
        kinds: column of the table -> how many values, of those that can be the class by --set data.label=COLUMN.
        numbers: column of the table -> (least, greatest), of those that can be attributes.
    """

    path: str
    kind: str
    total: int
    sizes: dict[str, int]
    modes: dict[str, int]
    values: tuple[float, float] | None
    classes: dict[str, int]
    splits: dict[str, int]
    unreadable: tuple[Problem, ...]
    duplicates: tuple[tuple[str, ...], ...]
    notes: tuple[str, ...]
    command: str
    reason: str
    captions: int = 0
    kinds: dict[str, int] = field(default_factory=dict)
    numbers: dict[str, tuple[float, float]] = field(default_factory=dict)

    def text(self) -> str:
        """The survey as lines for a terminal; every unreadable file has one."""
        readable = sum(self.sizes.values())
        lines = [f"{self.path} ({self.kind}): {readable:,} of {self.total:,} images can be read"]
        lines += [f"  sizes       {listing(self.sizes, 8)} (height×width)"] if self.sizes else []
        lines += [f"  pixels      {listing(self.modes, 8)}"] if self.modes else []
        lines += [f"  values      {self.values[0]:.4g} to {self.values[1]:.4g}"] if self.values else []
        named = ", ".join(f"{name}: {count}" for name, count in list(self.classes.items())[:20])
        lines += (
            [f"  classes     {len(self.classes)} ({named}{', …' if len(self.classes) > 20 else ''})"] if named else []
        )
        lines += self._table()
        lines += [
            f"  splits      {', '.join(f'{name}: {count:,}' for name, count in self.splits.items())}{self._few()}"
        ]
        if self.duplicates:
            groups = "; ".join(" = ".join(group[:4]) for group in self.duplicates[:5])
            more = "; …" if len(self.duplicates) > 5 else ""
            lines += [f"  duplicates  {len(self.duplicates)} groups of the same pixels ({groups}{more})"]
        lines += [f"  note        {note}" for note in self.notes]
        lines += [f"  unreadable  {file}: {reason}" for file, reason in self.unreadable]
        return "\n".join(
            [*lines, f"to train: {self.command}" if self.command else f"cannot be trained on: {self.reason}"]
        )

    def _few(self) -> str:
        """A word on scores that will rest on a handful of images."""
        if self.splits.get("test", 0) >= FEW or not self.splits.get("train"):
            return ""
        return f" (with fewer than {FEW} held out, scores say little, of copies above all)"

    def _table(self) -> list[str]:
        """The lines about its table."""
        kinds = ", ".join(f"{name} ({count} values)" for name, count in self.kinds.items())
        numbers = ", ".join(f"{name} ({low:.4g} to {high:.4g})" for name, (low, high) in self.numbers.items())
        lines = [f"  captions    {self.captions:,} of {self.total:,}"] if self.captions else []
        lines += [f"  as class    {kinds}: --set data.label=COLUMN"] if kinds else []
        return lines + ([f"  numbers     {numbers}: --set data.attributes=COLUMN,..."] if numbers else [])


def survey(path: Path) -> Survey:
    """Look at every file of a folder, a zip or a folder of IDX files.

    Raises:
        BadData: there is nothing of the kind, or no image in it.
    """
    path = Path(path).expanduser()
    store = open_store(path)
    if not any(is_image(name) for name in store.names) and any("-ubyte" in name for name in store.names):
        return _of_idx(path)
    try:
        layout, reason = arrange(store), ""
    except BadData as error:
        images = tuple(Entry(name, name, None, None, None) for name in store.names if is_image(name))
        if not images:
            raise
        layout, reason = Layout(images, (), (), "layout not recognised"), str(error)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what Pillow warns of is in the reasons
        looks, problems = _look(store, [entry.file for entry in layout.entries])
    splits = {name: rows for name in ("train", "test") if (rows := _rows(layout, name, path))}
    labels = Counter(entry.label for entry in layout.entries)
    table = table_of(store)
    duplicates = _groups((look.digest, file) for file, look in looks.items())
    result = Survey(
        path=str(path),
        kind=layout.kind,
        total=len(layout.entries) + len(store.refused),
        sizes=dict(Counter(f"{look.header.height}×{look.header.width}" for look in looks.values())),
        modes=dict(Counter(look.header.mode for look in looks.values())),
        values=_range((look.low, look.high) for look in looks.values()),
        classes={name: labels[name] for name in layout.classes},
        splits={name: len(rows) for name, rows in splits.items()},
        unreadable=(*store.refused, *problems),
        duplicates=duplicates,
        notes=(*_notes(layout, looks), *_crossing(duplicates, layout, splits)),
        command="",
        reason=reason,
        captions=sum(entry.text is not None for entry in layout.entries),
        kinds=table.kinds,
        numbers=table.numbers,
    )
    told = [] if reason else settings_for(table, store, layout, splits.get("train", []))
    return result if reason else _judged(result, layout, looks, path, told)


class _Look(NamedTuple):
    """What is kept of a decoded image."""

    header: Header
    digest: bytes
    low: float
    high: float
    opaque: bool


def _look(store: Store, files: Sequence[str]) -> tuple[dict[str, _Look], list[Problem]]:
    looks, problems = {}, []
    for file in files:
        try:
            header, pixels = decode(store.read(file), file)
        except BadData as error:
            problems.append(Problem(file, str(error).removeprefix(f"{file}: ")))
            continue
        low, high = scaled(np.array([pixels.min(), pixels.max()])).tolist()
        opaque = not header.raw and header.bands == 4 and bool((pixels[..., 3] == 255).all())
        looks[file] = _Look(header, _digest(pixels), low, high, opaque)
    return looks, problems


def _judged(result: Survey, layout: Layout, looks: dict[str, _Look], path: Path, told: Sequence[str]) -> Survey:
    """The survey with the command that trains on it, or the reason why none does."""
    headers = [look.header for look in looks.values()]
    command = f"inkdrop train folder --data {shlex.quote(str(path))}"
    if result.unreadable:
        return replace(result, reason=f"{len(result.unreadable)} files cannot be read; remove or mend them")
    try:
        divide(layout, "train", HOLDOUT, path)
        divide(layout, "test", HOLDOUT, path)
    except BadData as error:
        return replace(result, reason=str(error))
    side = suggested_size(headers)
    reason = ""
    for wish, options in (
        (Wish(), ""),
        (Wish((side, side), "crop"), f" --set data.resize=crop --set data.size={side}"),
    ):
        try:
            infer(headers, list(looks), wish, path)
        except (BadData, BadArgument) as error:
            reason = reason or str(error)
        else:
            tail = "".join(f" --set {shlex.quote(setting)}" for setting in told)
            return replace(result, command=command + options + tail)
    return replace(result, reason=reason)


def _rows(layout: Layout, split: str, path: Path) -> list[int]:
    try:
        return divide(layout, split, HOLDOUT, path)
    except BadData:
        return []


def _notes(layout: Layout, looks: dict[str, _Look]) -> list[str]:
    notes = []
    if layout.unused:
        more = ", …" if len(layout.unused) > 3 else ""
        notes.append(f"{len(layout.unused)} images do not count in this layout: {', '.join(layout.unused[:3])}{more}")
    deep = sum(look.header.mode.startswith("16-bit") for look in looks.values())
    if deep:
        notes.append(f"{deep} colour PNGs of 16 bits are read with their upper 8; save uint16 .npy to keep all")
    if looks and all(look.opaque for look in looks.values()):
        notes.append("alpha is opaque everywhere; --set data.channels=rgb leaves it out")
    raw = next((look.header for look in looks.values() if look.header.raw), None)
    if raw is not None:
        text = f".npy is read as (H, W, C): {raw.height}×{raw.width} pixels of {raw.bands} channels"
        odd = raw.bands > max(4, min(raw.height, raw.width))
        notes.append(f"{text}; if the files are (C, H, W), transpose them before training" if odd else text)
    floats = [look for look in looks.values() if look.header.dtype == "float32"]
    if floats and min(look.low for look in floats) >= 0:
        notes.append("no float is below 0; if they were meant as [0, 1], save 2·x − 1")
    return notes


def _crossing(duplicates: Sequence[tuple[str, ...]], layout: Layout, splits: dict[str, list[int]]) -> list[str]:
    """A note if the same pixels are in both splits."""
    split = {layout.entries[row].file: name for name, rows in splits.items() for row in rows}
    both = sum(len({split[file] for file in group if file in split}) == 2 for group in duplicates)
    return [f"{both} groups of duplicates are in both splits, so scores on the test split flatter"] if both else []


def _of_idx(path: Path) -> Survey:
    """A survey of a folder of IDX files."""
    problems: list[Problem] = []
    sizes, splits, classes, digests = Counter[str](), {}, Counter[str](), []
    ends, total = [], 0
    for part in ("train", "test"):
        try:
            data = idx(part, data=path)
            images, labels = (read_idx(file) for file in idx_files(path, part))
        except BadData as error:
            problems.append(Problem(part, str(error)))
            continue
        total += len(data)
        splits[part] = len(data)
        sizes[f"{data.shape[1]}×{data.shape[2]}"] += len(data)
        classes.update({name: int((labels == i).sum()) for i, name in enumerate(data.classes)})
        digests += [(_digest(image), data.name(row)) for row, image in enumerate(images)]
        low, high = scaled(np.array([images.min(), images.max()])).tolist()
        ends.append((low, high))
    plain = set(sizes) == {"28×28"} and len(classes) == 10
    where = "--data" if plain else "--set data=idx --set"
    quoted = shlex.quote(str(path) if plain else f"data.data={path}")
    return Survey(
        path=str(path),
        kind="IDX files",
        total=total,
        sizes=dict(sizes),
        modes={"8-bit grey": total} if total else {},
        values=_range(ends),
        classes=dict(classes),
        splits=splits,
        unreadable=tuple(problems),
        duplicates=_groups(digests),
        notes=(),
        command="" if problems else f"inkdrop train mnist {where} {quoted}",
        reason="; ".join(problem.reason for problem in problems),
    )


def _digest(pixels: np.ndarray) -> bytes:
    """A hash of type, shape and values."""
    total = hashlib.sha256(f"{pixels.dtype} {pixels.shape}".encode())
    total.update(np.ascontiguousarray(pixels).data)
    return total.digest()


def _groups(digests: Iterable[tuple[bytes, str]]) -> tuple[tuple[str, ...], ...]:
    """The names that share a hash, in groups of at least two."""
    by_digest: defaultdict[bytes, list[str]] = defaultdict(list)
    for digest, name in digests:
        by_digest[digest].append(name)
    return tuple(tuple(names) for names in by_digest.values() if len(names) > 1)


def _range(ends: Iterable[tuple[float, float]]) -> tuple[float, float] | None:
    pairs = list(ends)
    return (min(low for low, _ in pairs), max(high for _, high in pairs)) if pairs else None
