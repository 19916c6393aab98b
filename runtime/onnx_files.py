"""The files of an ONNX folder before anything reads them: no links, nothing outside, sizes and sha256 as stated.

Digests of files that fit into a moment are computed at every load. Hashing gigabytes of weights and looking
for NaN in them takes seconds, so that is done once per file: a stamp in the user's cache folder remembers
device, inode, size and both times of a file that passed, and any write to the file changes those.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
import stat
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from melt_edge.errors import FormatError, MeltError
from melt_edge.files import atomic_output, default_cache_dir

logger = logging.getLogger(__name__)

MAX_SMALL_BYTES = 64 * 2**20
STAMP_FROM_BYTES = 256 * 2**20  # below it the check takes a moment and leaves no trace
_PIECE_BYTES = 8 * 2**20
_PART = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.+-]{0,127}")


@dataclass(frozen=True)
class FileEntry:
    """What the manifest says of a file. sha256: 64 hexadecimal digits."""

    size: int
    sha256: str


@dataclass(frozen=True)
class FloatRange:
    """A tensor of the weights file whose values must be finite. Units: bytes."""

    name: str
    dtype: str
    offset: int
    length: int


def checked_file(folder: Path, name: str, entry: FileEntry, *, source: Path) -> Path:
    """The path of a file of the folder, if it is a plain one inside it and as long as stated.

    onnxruntime itself refuses paths that leave the folder and symbolic links, but reads through hard links.
    Raises: FormatError.
    """
    parts = name.split("/")
    if len(parts) > 2 or not all(_PART.fullmatch(part) and ".." not in part for part in parts):
        raise FormatError(f"{source}: names the file {name[:80]!r}, expected a plain name inside the folder")
    path = folder.joinpath(*parts)
    try:
        if len(parts) == 2 and stat.S_ISLNK(path.parent.lstat().st_mode):
            raise FormatError(f"{path.parent}: is a link, expected a folder; copy the folder with its links followed")
        found = path.lstat()
        if Path(os.path.realpath(path)) != Path(os.path.realpath(folder)).joinpath(*parts):
            raise FormatError(f"{path}: leads out of its folder; copy the folder with its links followed")
    except OSError as err:
        raise FormatError(f"{path}: cannot be read ({err.strerror or err}); export the folder again") from err
    if not stat.S_ISREG(found.st_mode) or found.st_nlink != 1:
        kind = "a link" if stat.S_ISLNK(found.st_mode) or found.st_nlink > 1 else "no plain file"
        raise FormatError(f"{path}: is {kind}, expected a plain file; copy the folder with its links followed")
    if found.st_size != entry.size:
        raise FormatError(
            f"{path}: has {found.st_size} bytes, {source.name} says {entry.size}; "
            "it is cut off or another file: fetch or export the folder again"
        )
    return path


def read_checked(path: Path, entry: FileEntry) -> bytes:
    """The bytes of a small file, whose digest is as stated. Raises: FormatError."""
    if entry.size > MAX_SMALL_BYTES:
        raise FormatError(f"{path}: has {entry.size} bytes, expected at most {MAX_SMALL_BYTES} for such a file")
    try:
        with path.open("rb") as file:
            data = file.read(entry.size + 1)
    except OSError as err:
        raise FormatError(f"{path}: cannot be read ({err.strerror or err}); export the folder again") from err
    _same_digest(path, hashlib.sha256(data).hexdigest(), entry)
    return data


def check_weights(path: Path, entry: FileEntry, ranges: Sequence[FloatRange], *, tables: Mapping[str, str]) -> None:
    """Compare the weights file's digest and look for values that are not finite, unless a stamp says it was done.

    tables: digests of the graphs, which say what lies where; other graphs are another check.
    Raises: FormatError naming the tensor that holds NaN or Inf, or for another digest.
    """
    if entry.size < STAMP_FROM_BYTES:
        _same_digest(path, _digest(path), entry)
        _check_finite(path, ranges)
        return
    key = _stamp_key(path, entry, tables)
    stamp = default_cache_dir() / "checked" / f"{key}.json"
    with suppress(OSError):
        if stamp.read_text(encoding="ascii") == _stamp_text(path, entry):
            logger.info("%s: checked before and unchanged since (%s)", path, stamp)
            return
    logger.info("%s: checking %.1f GB of weights, once for this file", path, entry.size / 1e9)
    _same_digest(path, _digest(path), entry)
    _check_finite(path, ranges)
    if _stamp_key(path, entry, tables) != key:
        raise FormatError(f"{path}: changed while it was checked; load it again")
    # A folder that cannot be written costs the next load the same seconds, no more.
    with suppress(OSError, MeltError):
        stamp.parent.mkdir(parents=True, exist_ok=True)
        with atomic_output(stamp, force=True) as temporary:
            temporary.write_text(_stamp_text(path, entry), encoding="ascii")


def _stamp_key(path: Path, entry: FileEntry, tables: Mapping[str, str]) -> str:
    found = path.stat()
    about = [
        str(path.resolve()),
        found.st_dev,
        found.st_ino,
        found.st_size,
        found.st_mtime_ns,
        found.st_ctime_ns,
        entry.sha256,
        sorted(tables.items()),
    ]
    return hashlib.sha256(json.dumps(about).encode()).hexdigest()


def _stamp_text(path: Path, entry: FileEntry) -> str:
    return json.dumps({"file": str(path.resolve()), "sha256": entry.sha256})


def _digest(path: Path) -> str:
    digest = hashlib.sha256()
    try:
        with path.open("rb") as file:
            while piece := file.read(_PIECE_BYTES):
                digest.update(piece)
    except OSError as err:
        raise FormatError(f"{path}: cannot be read ({err.strerror or err}); export the folder again") from err
    return digest.hexdigest()


def _same_digest(path: Path, found: str, entry: FileEntry) -> None:
    if found != entry.sha256:
        raise FormatError(
            f"{path}: has the sha256 {found[:12]}..., the manifest says {entry.sha256[:12]}...; "
            "the file is damaged or not of this export: fetch or export the folder again"
        )


def _check_finite(path: Path, ranges: Sequence[FloatRange]) -> None:
    with path.open("rb") as file:
        for part in ranges:
            file.seek(part.offset)
            left = part.length
            while left > 0:
                piece = file.read(min(left, _PIECE_BYTES))
                if not piece:
                    raise FormatError(f"{path}: became shorter while it was checked; load it again")
                left -= len(piece)
                if not np.isfinite(np.frombuffer(piece, dtype=part.dtype)).all():
                    raise FormatError(
                        f"{path}: tensor {part.name!r} has values that are not finite (NaN or Inf); "
                        "the weights are damaged, fetch or export them again"
                    )
