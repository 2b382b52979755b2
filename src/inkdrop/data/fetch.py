"""Downloads into a cache: a file gets its final name only after its checksum has been verified."""

from __future__ import annotations

import hashlib
import http.client
import os
import tempfile
import urllib.request
from collections.abc import Iterator, Sequence
from pathlib import Path

from inkdrop.errors import BadArgument, BadData

__all__ = ["cache_folder", "fetch"]

_TIMEOUT = 30.0  # seconds without an answer
_BLOCK = 1 << 20


class _Failed(Exception):
    """A mirror did not give the file; another may."""


def cache_folder(name: str) -> Path:
    """Where downloads of the set `name` lie: $INKDROP_CACHE/name, or ~/.cache/inkdrop/name."""
    root = os.environ.get("INKDROP_CACHE")
    return (Path(root).expanduser() if root else Path.home() / ".cache" / "inkdrop") / name


def fetch(
    file: Path, mirrors: Sequence[str], *, md5: str | None = None, sha256: str | None = None, limit: int = 1 << 30
) -> Path:
    """The file, downloaded from the first mirror that gives it with the right checksum, unless it is there already.

    The bytes go to a temporary file beside it, which is renamed only when the checksum is right. It is the one that is
    published, md5 or the (first digits of the) sha256; it guards against damage on the way.

    Args:
        file: the final path; its folder is made if need be.
        mirrors: URLs of the folders that hold a file of this name, tried in turn.
        md5: the hexadecimal checksum of the content; give this or sha256.
        sha256: the hexadecimal checksum of the content, or what it begins with.
        limit: the greatest size taken, in bytes.

    Raises:
        BadArgument: no checksum, or two.
        BadData: no mirror gave it, or the folder cannot be written; each reason is named.
    """
    if (md5 is None) == (sha256 is None):
        raise BadArgument(f"download of {file.name}: need one checksum, md5 or sha256")
    kind, begins = ("sha256", sha256 or "") if md5 is None else ("md5", md5)
    reasons = []
    try:
        if file.is_file() and _digest(file, kind).startswith(begins):
            return file
        file.parent.mkdir(parents=True, exist_ok=True)
        for mirror in mirrors:
            try:
                return _download(f"{mirror.rstrip('/')}/{file.name}", file, kind, begins, limit)
            except _Failed as failure:
                reasons.append(str(failure))
    except OSError as error:
        reason = error.strerror or error
        raise BadData(
            f"download of {file.name}: {file.parent}: {reason}; set INKDROP_CACHE to another folder"
        ) from error
    raise BadData(
        f"download of {file.name}: {'; '.join(reasons)}; if there is no network, "
        f"get the file elsewhere and put it into {file.parent}"
    )


def _download(url: str, file: Path, kind: str, begins: str, limit: int) -> Path:
    """What `url` gives, under the final name if its checksum is right; else _Failed, and nothing is left."""
    handle, name = tempfile.mkstemp(prefix=f".{file.name}.", dir=file.parent)
    part = Path(name)
    try:
        total, size = hashlib.new(kind, usedforsecurity=False), 0
        with os.fdopen(handle, "wb") as out:
            for block in _blocks(url):
                size += len(block)
                if size > limit:
                    raise _Failed(f"{url} sent more than {limit:,} bytes")
                total.update(block)
                out.write(block)
        if not total.hexdigest().startswith(begins):
            raise _Failed(f"{url} has the {kind} {total.hexdigest()}, need {begins}")
        return part.replace(file)
    finally:
        part.unlink(missing_ok=True)


def _blocks(url: str) -> Iterator[bytes]:
    """The body of an answer in blocks; _Failed where the network fails."""
    try:
        with urllib.request.urlopen(url, timeout=_TIMEOUT) as answer:
            while block := answer.read(_BLOCK):
                yield block
    except (OSError, http.client.HTTPException) as error:
        reason = getattr(error, "reason", None) or error
        raise _Failed(f"{url}: {' '.join(str(reason).split()) or type(reason).__name__}") from error


def _digest(file: Path, kind: str) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, lambda: hashlib.new(kind, usedforsecurity=False)).hexdigest()
