"""Layout: which files of a store are images, and the split, the label and the caption of each."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import PurePosixPath
from typing import NamedTuple

from inkdrop.data.images import is_image
from inkdrop.data.metadata import TABLES, Columns, Row, read_table
from inkdrop.data.store import Store, natural
from inkdrop.errors import BadData

__all__ = ["Entry", "Layout", "arrange"]

_TRAIN = ("train", "training")
_TEST = ("test", "testing", "validation", "valid", "val")  # the first that is there is held out


class Entry(NamedTuple):
    """One image.

    Attributes:
        file: its name in the store.
        key: its name below the folder that holds everything; the hold-out is drawn by it.
        split: "train" or "test" where the layout says so, else None.
        label: its class name, or None.
        text: its caption, or None.
        values: its continuous attributes.
    """

    file: str
    key: str
    split: str | None
    label: str | None
    text: str | None
    values: tuple[float, ...] = ()


class Layout(NamedTuple):
    """How a store is laid out.

    Attributes:
        entries: the images that count, in natural order.
        classes: the class names in natural order; () if there are no labels.
        unused: images that do not count: not listed in the table, or in a second held-out folder.
        kind: what was recognised, for people: "class folders", "metadata.csv", "train/ and test/ with class folders".
    """

    entries: tuple[Entry, ...]
    classes: tuple[str, ...]
    unused: tuple[str, ...]
    kind: str


def arrange(store: Store, columns: Columns | None = None) -> Layout:
    """The layout of a store.

    Args:
        store: the files.
        columns: of the table, what is read besides those of usual names; there must be a table.

    A folder that alone holds all images is entered first. Folders train and test (or validation, valid, val) are
    splits if no image lies beside them. Labels come from the table if one has a column for labels or captions (then
    images that it does not list are left out), else from the topmost folders, else there are none.

    Raises:
        BadData: no image; images both beside and inside class folders; a bad table; labels that some lack.
    """
    images = [name for name in store.names if is_image(name)]
    if not images:
        others = sorted({PurePosixPath(name).suffix.lower() or "no suffix" for name in store.names})
        found = f"{len(store.names)} other files ({', '.join(others[:6])})" if others else "nothing"
        found += "".join(f", and {file}: {reason}" for file, reason in store.refused[:1])
        raise BadData(f"{store.path}: no images, found {found}; read are PNG, JPEG, WebP, BMP, GIF and .npy")
    rows, table = _tables(store, columns or Columns())
    if columns is not None and columns != Columns() and not table:
        raise BadData(
            f"{store.path}: no table with labels or captions, so there is no column to read; add metadata.csv"
        )
    listed = _listed(rows, images, table) if table else images
    root = _enter(listed)
    splits = _splits(listed, root)
    chosen = [name for name in listed if splits is None or name.removeprefix(root).split("/")[0] in splits]
    entries = []
    for name in chosen:
        key = name.removeprefix(root)
        split = splits[key.split("/")[0]] if splits is not None else None
        row = rows[name] if table else Row(name, name, None, None)
        entries.append(Entry(name, key, split, row.label, row.text, row.values))
    if not table:
        entries = _by_folders(entries)
    _check_labels(entries, rows, table)
    classes = tuple(sorted({entry.label for entry in entries if entry.label is not None}, key=natural))
    kind = table or ("class folders" if classes else "images without labels")
    if splits is not None:
        kind = f"{' and '.join(sorted(f'{part}/' for part in splits))} with {kind}"
    unused = sorted(set(images) - set(chosen), key=natural)
    return Layout(tuple(entries), classes, tuple(unused), kind)


def _tables(store: Store, columns: Columns) -> tuple[dict[str, Row], str]:
    """The rows of every table, by the image's name in the store, and the name of the tables ("" if none counts)."""
    rows: dict[str, Row] = {}
    used: set[str] = set()
    tables = [PurePosixPath(name) for name in store.names if PurePosixPath(name).name in TABLES]
    if len({table.parent for table in tables}) < len(tables):
        raise BadData(f"{store.path}: several of {', '.join(TABLES)} in one folder; keep one")
    for table in tables:
        found = read_table(store.read(str(table)), str(table), columns)
        if not any(row.label is not None or row.text is not None or row.values for row in found):
            continue
        used.add(table.name)
        for row in found:
            name = (table.parent / row.file).as_posix()
            if name in rows:
                raise BadData(f"{row.where}: {name} is named in {rows[name].where} too")
            rows[name] = row
    return rows, " and ".join(sorted(used))


def _listed(rows: dict[str, Row], images: Sequence[str], table: str) -> list[str]:
    """The images that a table lists, in natural order."""
    known = set(images)
    missing = [row for name, row in rows.items() if name not in known]
    if missing:
        first = f"{missing[0].where}: no image {missing[0].file}"
        raise BadData(first + (f", and {len(missing) - 1} more of {table} are missing" if len(missing) > 1 else ""))
    return [name for name in images if name in rows]


def _enter(names: Sequence[str]) -> str:
    """The prefix "a/b/" of the folder that alone holds all images; a folder named as a split is not entered."""
    root = ""
    while True:
        tops = _tops(names, root)
        if len(tops) != 1 or None in tops:
            return root
        top = next(iter(tops))
        if top in _TRAIN or top in _TEST:
            return root
        root += f"{top}/"


def _tops(names: Iterable[str], root: str) -> set[str | None]:
    """The folders directly below root that hold images; None stands for root itself."""
    rest = (name.removeprefix(root).split("/", 1) for name in names)
    return {parts[0] if len(parts) > 1 else None for parts in rest}


def _splits(names: Sequence[str], root: str) -> dict[str, str] | None:
    """Which folder is which split, {"train": "train", "val": "test"}; None if the folders are not splits."""
    tops = _tops(names, root)
    if None in tops or not tops <= {*_TRAIN, *_TEST}:
        return None
    train = [name for name in _TRAIN if name in tops]
    test = [name for name in _TEST if name in tops][:1]
    return dict.fromkeys(train, "train") | dict.fromkeys(test, "test")


def _by_folders(entries: Sequence[Entry]) -> list[Entry]:
    """The entries labelled by their topmost folders (below that of the split), if there are at least two."""
    below = [entry.key if entry.split is None else entry.key.split("/", 1)[1] for entry in entries]
    root = _enter(below)
    paths = [name.removeprefix(root).split("/") for name in below]
    beside = [entry.file for entry, path in zip(entries, paths, strict=True) if len(path) == 1]
    within = [entry.file for entry, path in zip(entries, paths, strict=True) if len(path) > 1]
    if beside and within:
        raise BadData(f"images both beside and inside class folders: {beside[0]} and {within[0]}; move one sort away")
    if beside:
        return list(entries)
    return [entry._replace(label=path[0]) for entry, path in zip(entries, paths, strict=True)]


def _check_labels(entries: Sequence[Entry], rows: dict[str, Row], table: str) -> None:
    """Refuse labels that some images have and others lack."""
    without = [entry for entry in entries if entry.label is None]
    if without and len(without) < len(entries):
        where = rows[without[0].file].where if table else without[0].file
        raise BadData(f"{where}: no label, though {len(entries) - len(without)} other images have one")
