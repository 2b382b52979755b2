"""Stores: the files of a folder or of a zip, by their names relative to it; nothing outside it is ever read."""

from __future__ import annotations

import os
import re
import stat
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple, Protocol

from inkdrop.errors import BadData

__all__ = ["FILE_LIMIT", "Folder", "Problem", "Store", "Zip", "natural", "open_store", "unsafe"]

FILE_LIMIT = 1 << 28  # bytes of one file, uncompressed


class Problem(NamedTuple):
    """A file that cannot be used, and why, in a few words."""

    file: str
    reason: str


class Store(Protocol):
    """The files of a folder or zip.

    Attributes:
        path: the folder or the zip.
        names: of its files, relative, with "/", in natural order; hidden ones (a part that begins with ".", or
            "__MACOSX") are left out.
        refused: what is not read: links that lead outside, unsafe names, encrypted members.
    """

    path: Path
    names: tuple[str, ...]
    refused: tuple[Problem, ...]

    def read(self, name: str) -> bytes:
        """The content of a file.

        Raises:
            BadData: it cannot be read, or is larger than FILE_LIMIT; the message names it.
        """
        ...


def natural(name: str) -> tuple[list[str | int], str]:
    """The key of natural order: "2" before "10", small letters as large ones."""
    parts = re.split(r"([0-9]+)", name)
    return [int(part) if i % 2 else part.casefold() for i, part in enumerate(parts)], name


def unsafe(name: str) -> str | None:
    """Why a relative name must not be followed: it is absolute or leads upwards. None if it is safe."""
    if "\0" in name or "\\" in name or re.match(r"[A-Za-z]:", name) or name.startswith(("/", "~")):
        return "not a relative path with / between its parts"
    if ".." in PurePosixPath(name).parts:
        return "leads outside by .."
    return None


def open_store(path: Path) -> Store:
    """The store at a path.

    Raises:
        BadData: nothing is there, or a file that is no zip.
    """
    path = Path(path).expanduser()
    try:
        if path.is_dir():
            return Folder(path)
        if path.is_file():
            return Zip(path)
    except (OSError, zipfile.BadZipFile, NotImplementedError, ValueError) as error:
        raise BadData(f"{path}: cannot be read as a folder or a zip ({error})") from error
    raise BadData(f"{path}: no such folder or zip; give the folder that holds the images")


class Folder:
    """The files below a folder; links to files are followed if they stay inside, links to folders never are.

    Args:
        path: the folder.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._root = path.resolve()
        refused: list[Problem] = []
        self.names = tuple(sorted(self._walk(self._root, refused), key=natural))
        self.refused = tuple(sorted(refused))

    def _walk(self, folder: Path, refused: list[Problem]) -> Iterator[str]:
        try:
            entries = sorted(os.scandir(folder), key=lambda entry: entry.name)
        except OSError as error:
            refused.append(Problem(self._name(folder), error.strerror or "cannot be listed"))
            return
        for entry in entries:
            if _hidden(entry.name):
                continue
            path = folder / entry.name
            if entry.is_symlink():
                reason = self._link(path)
                if reason is not None:
                    refused.append(Problem(self._name(path), reason))
                    continue
            elif entry.is_dir():
                yield from self._walk(path, refused)
                continue
            if path.is_file():
                yield self._name(path)

    def _link(self, link: Path) -> str | None:
        """Why a link is not followed, or None."""
        try:
            target = link.resolve(strict=True)
        except (OSError, RuntimeError):
            return "a link that leads nowhere"
        if not target.is_relative_to(self._root):
            return "a link that leads outside the folder; copy the file in"
        return "a link to a folder; copy the folder in" if target.is_dir() else None

    def _name(self, path: Path) -> str:
        return path.relative_to(self._root).as_posix()

    def read(self, name: str) -> bytes:
        """The content of a file."""
        path = self._root / name
        try:
            with path.open("rb") as stream:
                data = stream.read(FILE_LIMIT + 1)
        except OSError as error:
            raise BadData(f"{name}: {error.strerror or 'cannot be read'}") from error
        if len(data) > FILE_LIMIT:
            raise BadData(f"{name}: larger than {FILE_LIMIT >> 20} MiB")
        return data


class Zip:
    """The members of a zip, read in place: nothing is extracted.

    Every process opens the file for itself, so that a store can be handed to workers.

    Args:
        path: the zip.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._open: tuple[int, zipfile.ZipFile] | None = None
        members = self._archive().infolist()
        reasons = {member.filename: _refusal(member) for member in members if not member.is_dir()}
        shown = [name for name in reasons if not any(_hidden(part) for part in PurePosixPath(name).parts)]
        self.names = tuple(sorted((name for name in shown if reasons[name] is None), key=natural))
        self.refused = tuple(sorted(Problem(name, reason) for name in shown if (reason := reasons[name]) is not None))

    def _archive(self) -> zipfile.ZipFile:
        if self._open is None or self._open[0] != os.getpid():
            self._open = os.getpid(), zipfile.ZipFile(self.path)
        return self._open[1]

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_open": None}

    def read(self, name: str) -> bytes:
        """The content of a member; no more bytes are unpacked than its entry declares."""
        try:
            with self._archive().open(name) as stream:
                return stream.read(FILE_LIMIT)
        except (OSError, EOFError, zlib.error, zipfile.BadZipFile, RuntimeError, KeyError) as error:
            raise BadData(f"{name}: {_reason(error)}") from error


def _refusal(member: zipfile.ZipInfo) -> str | None:
    """Why a member is not read, or None."""
    if stat.S_ISLNK(member.external_attr >> 16):
        return "a link inside a zip"
    if member.flag_bits & 1:
        return "encrypted"
    if member.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        return "packed in a way other than stored or deflated"
    if member.file_size > FILE_LIMIT:
        return f"larger than {FILE_LIMIT >> 20} MiB"
    return unsafe(member.filename)


def _reason(error: Exception) -> str:
    return "damaged in the zip" if isinstance(error, zipfile.BadZipFile | zlib.error | EOFError) else str(error)


def _hidden(part: str) -> bool:
    return (part.startswith(".") and part not in (".", "..")) or part == "__MACOSX"
