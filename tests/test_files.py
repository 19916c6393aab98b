"""Atomic writing: the target is the whole new file, or what was there before."""

from __future__ import annotations

import os
import stat
from pathlib import Path

import pytest

from melt_edge.errors import ConfigError
from melt_edge.files import atomic_folder, atomic_output


def test_a_file_appears_when_the_block_ends(tmp_path: Path) -> None:
    target = tmp_path / "a.bin"
    with atomic_output(target) as temporary:
        temporary.write_bytes(b"new")
        assert not target.exists()
        assert temporary.parent == tmp_path
    assert target.read_bytes() == b"new"
    assert os.listdir(tmp_path) == ["a.bin"]


def test_an_exception_leaves_the_old_file(tmp_path: Path) -> None:
    target = tmp_path / "a.bin"
    target.write_bytes(b"old")
    with pytest.raises(RuntimeError, match="half way"), atomic_output(target, force=True) as temporary:
        temporary.write_bytes(b"ne")
        raise RuntimeError("half way")
    assert target.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["a.bin"]


def test_nothing_is_overwritten_without_force(tmp_path: Path) -> None:
    target = tmp_path / "a.bin"
    target.write_bytes(b"old")
    with pytest.raises(ConfigError, match="exists already"), atomic_output(target):
        pytest.fail("must not get here")
    with atomic_output(target, force=True) as temporary:
        temporary.write_bytes(b"new")
    assert target.read_bytes() == b"new"


def test_a_file_that_appears_meanwhile_is_kept(tmp_path: Path) -> None:
    target = tmp_path / "a.bin"
    with pytest.raises(ConfigError, match="exists already"), atomic_output(target) as temporary:
        temporary.write_bytes(b"new")
        target.write_bytes(b"somebody else's")
    assert target.read_bytes() == b"somebody else's"


def test_the_umask_is_kept(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        with atomic_output(tmp_path / "a.bin") as temporary:
            temporary.write_bytes(b"x")
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "a.bin").stat().st_mode) == 0o640


def test_impossible_targets(tmp_path: Path) -> None:
    for target, words in (
        (tmp_path / "no" / "a.bin", "folder does not exist"),
        (tmp_path, "is a folder"),
    ):
        with pytest.raises(ConfigError, match=words), atomic_output(target):
            pytest.fail("must not get here")


def test_a_folder_appears_whole_and_replaces_only_by_force(tmp_path: Path) -> None:
    target = tmp_path / "model"
    with atomic_folder(target) as temporary:
        (temporary / "a").write_text("1")
        assert not target.exists()
    with pytest.raises(ConfigError, match="exists already"), atomic_folder(target):
        pytest.fail("must not get here")
    with pytest.raises(RuntimeError), atomic_folder(target, force=True) as temporary:
        (temporary / "b").write_text("2")
        raise RuntimeError
    assert [file.name for file in target.iterdir()] == ["a"]
    with atomic_folder(target, force=True) as temporary:
        (temporary / "b").write_text("2")
    assert [file.name for file in target.iterdir()] == ["b"]
    assert os.listdir(tmp_path) == ["model"]
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="is a file"), atomic_folder(tmp_path / "file", force=True):
        pytest.fail("must not get here")
