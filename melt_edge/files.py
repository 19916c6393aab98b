"""Writing files and folders so that a killed or failed writer leaves the old one, or none.

Everything the project writes goes through here: a temporary name in the same folder, fsync, rename, fsync
of the folder.
"""

from __future__ import annotations

import os
import secrets
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from melt_edge.errors import ConfigError


@contextmanager
def atomic_output(path: str | Path, *, force: bool = False) -> Iterator[Path]:
    """A temporary path beside ``path`` that takes its place when the block ends without an exception.

    The temporary file exists and is empty; on an exception it is removed and ``path`` stays as it was.
    Raises: ConfigError if ``path`` exists and ``force`` is false, is a folder, or cannot be written.
    """
    path = Path(path)
    _check_target(path, force=force, folder=False)
    temporary = _temporary_name(path)
    try:
        # Mode 0666 less the umask: unlike mkstemp's 0600, others can read what the user lets them read.
        os.close(os.open(temporary, os.O_CREAT | os.O_EXCL | os.O_RDWR, 0o666))
    except OSError as err:
        raise ConfigError(f"{path}: cannot be written ({err.strerror or err}); choose another path") from err
    try:
        yield temporary
        sync(temporary)
        _check_target(path, force=force, folder=False)  # it may have appeared while we wrote
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    sync(path.parent)


def write_text(path: str | Path, text: str) -> None:
    """Write a file in UTF-8, whole or not at all, in place of what is there."""
    with atomic_output(path, force=True) as part:
        part.write_text(text, encoding="utf-8")


@contextmanager
def atomic_folder(path: str | Path, *, force: bool = False) -> Iterator[Path]:
    """A temporary folder beside ``path`` that takes its place when the block ends without an exception.

    With ``force`` an old folder is moved aside first and removed afterwards.
    Raises: ConfigError if ``path`` exists and ``force`` is false, is a file, or cannot be written.
    """
    path = Path(path)
    _check_target(path, force=force, folder=True)
    temporary = _temporary_name(path)
    old = _temporary_name(path)
    try:
        temporary.mkdir()
    except OSError as err:
        raise ConfigError(f"{path}: cannot be written ({err.strerror or err}); choose another path") from err
    try:
        yield temporary
        for file in temporary.iterdir():
            sync(file)
        sync(temporary)
        _check_target(path, force=force, folder=True)
        if path.exists():
            os.replace(path, old)
        os.replace(temporary, path)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
        if old.exists() and not path.exists():
            os.replace(old, path)  # the second rename failed: the old folder comes back
        shutil.rmtree(old, ignore_errors=True)
    sync(path.parent)


def default_cache_dir() -> Path:
    """The user's cache folder for melt-edge: the platform's, or below $XDG_CACHE_HOME where that is set."""
    home = os.environ.get("XDG_CACHE_HOME")
    if home:
        return Path(home) / "melt-edge"
    return Path.home() / ("Library/Caches" if sys.platform == "darwin" else ".cache") / "melt-edge"


def sync(path: Path) -> None:
    """Wait until a file's or a folder's bytes are on disk."""
    folder = path.is_dir()
    if folder and os.name == "nt":
        return  # Windows opens no folders, and its rename is journalled
    descriptor = os.open(path, os.O_RDONLY if folder else os.O_RDWR)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _temporary_name(path: Path) -> Path:
    return path.parent / f".{path.name}.{secrets.token_hex(4)}.part"


def _check_target(path: Path, *, force: bool, folder: bool) -> None:
    if not path.parent.is_dir():
        raise ConfigError(f"{path}: its folder does not exist; create {path.parent} first")
    if not path.exists() and not path.is_symlink():
        return
    if path.is_dir() != folder:
        found, expected = ("a folder", "a file") if path.is_dir() else ("a file", "a folder")
        raise ConfigError(f"{path}: is {found}, expected the name of {expected}; choose another path")
    if not force:
        raise ConfigError(f"{path}: exists already; choose another path or overwrite it with force (--force)")
