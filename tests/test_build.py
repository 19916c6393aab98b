"""The build: the pin, the patch series, the script that prepares llama.cpp, and what an install holds."""

from __future__ import annotations

import hashlib
import importlib.util
import io
import os
import re
import shutil
import subprocess
import sys
import tarfile
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest

from melt_edge.errors import AbiMismatchError
from melt_edge.runtime import library
from melt_edge.runtime.library import build_info, import_llama_cpp, sources_sha256

ROOT = Path(__file__).resolve().parent.parent
PATCHES = ROOT / "cpp" / "patches"
SCRIPT = ROOT / "cpp" / "cmake" / "prepare_llama_cpp.py"
LOCK = ROOT / "cpp" / "llama.cpp.lock"
MAX_PATCHES, MAX_CHANGED_LINES = 8, 250

FILE_BEFORE = "one\ntwo\nthree\nfour\nfive\n"
PATCH = """\
Subject: [PATCH] change a line

--- a/src/file.txt
+++ b/src/file.txt
@@ -1,5 +1,5 @@
 one
 two
-three
+drei
 four
 five
"""


def load_script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("prepare_llama_cpp", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


prepare = load_script()


def series() -> list[Path]:
    paths: list[Path] = prepare.read_series(PATCHES)
    return paths


# the pin


def test_lock_and_dependency_name_the_same_release() -> None:
    lock = prepare.read_lock(LOCK)
    assert re.fullmatch(r"[0-9a-f]{64}", lock["sha256"])
    pin = f"{lock['package']}=={lock['version']}"
    assert f'"{pin}",' in (ROOT / "pyproject.toml").read_text()
    assert pin in (ROOT / "constraints.txt").read_text().splitlines()


def test_library_was_built_from_this_pin_and_these_sources() -> None:
    info = build_info(import_llama_cpp())
    lock = prepare.read_lock(LOCK)
    assert info["llama_cpp_python"] == lock["version"]
    assert info["llama_cpp_commit"] == lock["commit"]
    assert info["sources_sha256"] == sources_sha256(ROOT / "cpp"), "the library is stale: run make setup"


def edit_the_series(cpp: Path) -> None:
    (cpp / "patches" / "series").write_text("".join(f"{path.name}\n" for path in series()[:-1]))


def edit_a_patch(cpp: Path) -> None:
    path = cpp / "patches" / series()[0].name
    path.write_text(path.read_text() + "\n")


def edit_a_source(cpp: Path) -> None:
    path = cpp / "src" / "looped.cpp"
    path.write_text(path.read_text() + "\n")


def add_a_source(cpp: Path) -> None:
    (cpp / "src" / "more.cpp").write_text("")


@pytest.mark.parametrize("edit", [edit_the_series, edit_a_patch, edit_a_source, add_a_source])
def test_library_of_other_sources_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, edit: Callable[[Path], None]
) -> None:
    """A checkout that moved on, with the library of yesterday: it would run other kernels than the tests saw."""
    module = import_llama_cpp()
    cpp = tmp_path / "cpp"
    for name in ("patches", "src"):
        shutil.copytree(ROOT / "cpp" / name, cpp / name)
    monkeypatch.setattr(library, "_CPP", cpp)
    library.check_build(build_info(module), library._python_side(module))
    edit(cpp)
    with pytest.raises(AbiMismatchError, match=r"built from other patches or C\+\+ sources.*make setup"):
        library.check_build(build_info(module), library._python_side(module))


# the series


def test_series_lists_every_patch_once() -> None:
    names = [path.name for path in series()]
    assert sorted(names) == sorted(path.name for path in PATCHES.glob("*.patch"))


def test_series_stays_small() -> None:
    changed = [
        line
        for path in series()
        for line in path.read_text().splitlines()
        if re.match(r"[+-](?![+-]{2} )", line) and line != "--"
    ]
    assert len(series()) <= MAX_PATCHES
    assert len(changed) <= MAX_CHANGED_LINES


@pytest.mark.parametrize("path", series(), ids=lambda path: path.stem)
def test_patch_says_why_it_exists(path: Path) -> None:
    header, _, diff = path.read_text().partition("\n---\n")
    assert diff
    assert header.startswith("From " + "0" * 40), "made with git format-patch --zero-commit"
    subject, _, body = header.partition("\n\n")
    assert re.search(r"^Subject: \[PATCH\] [a-z-]+: ", subject, re.MULTILINE)
    for field in ("Origin", "Forwarded", "Drop-When"):
        assert re.search(rf"^{field}: \S", body, re.MULTILINE), f"{path.name} lacks {field}"
    reason = re.split(r"^(?:Origin|Forwarded|Drop-When): ", body, maxsplit=1, flags=re.MULTILINE)[0]
    assert len(reason.split()) >= 10, f"{path.name} does not say why it is needed"


def test_series_hash_follows_order_and_content(tmp_path: Path) -> None:
    for name in ("a.patch", "b.patch"):
        (tmp_path / name).write_text(name)
    hashes = set()
    for order in ("a.patch\nb.patch\n", "b.patch\na.patch\n", "a.patch\n"):
        (tmp_path / "series").write_text(order)
        hashes.add(prepare.series_sha256(tmp_path))
    (tmp_path / "a.patch").write_text("changed")
    hashes.add(prepare.series_sha256(tmp_path))
    assert len(hashes) == 4


# the script, on a small archive and inside another git repository, where a careless `git apply` does nothing


@pytest.fixture
def project(tmp_path: Path) -> Path:
    subprocess.run(["git", "init", "-q", str(tmp_path)], check=True)
    (tmp_path / "cache").mkdir()
    archive = tmp_path / "cache" / "fake_cpp-1.0.tar.gz"
    with tarfile.open(archive, "w:gz") as tar:
        for name, text in {
            "fake_cpp-1.0/vendor/llama.cpp/include/llama.h": "// llama",
            "fake_cpp-1.0/vendor/llama.cpp/src/file.txt": FILE_BEFORE,
            "fake_cpp-1.0/vendor/llama.cpp/.git": "gitdir: ../nowhere",
            "fake_cpp-1.0/other.txt": "not ours",
        }.items():
            member = tarfile.TarInfo(name)
            member.size = len(text)
            tar.addfile(member, io.BytesIO(text.encode()))
    digest = hashlib.sha256(archive.read_bytes()).hexdigest()
    (tmp_path / "lock").write_text(f"package = fake-cpp\nversion = 1.0\nsha256 = {digest}\nsubdir = vendor/llama.cpp\n")
    (tmp_path / "patches").mkdir()
    (tmp_path / "patches" / "series").write_text("change-a-line.patch\n")
    (tmp_path / "patches" / "change-a-line.patch").write_text(PATCH)
    return tmp_path


def run_tree(project: Path, *more: str) -> subprocess.CompletedProcess[str]:
    files = ["--lock", str(project / "lock"), "--patches", str(project / "patches")]
    command = [sys.executable, str(SCRIPT), *files, "tree", str(project / "build" / "llama.cpp"), *more]
    env = {**os.environ, "MELT_CACHE_DIR": str(project / "cache"), "PIP_NO_INDEX": "1"}
    return subprocess.run(command, env=env, capture_output=True, text=True, timeout=120)


def test_tree_is_extracted_and_patched(project: Path) -> None:
    done = run_tree(project)
    assert done.returncode == 0, done.stderr
    tree = project / "build" / "llama.cpp"
    assert (tree / "src" / "file.txt").read_text() == FILE_BEFORE.replace("three", "drei")
    assert sorted(path.name for path in tree.rglob("*") if path.is_file()) == ["file.txt", "llama.h"]
    assert done.stdout.strip() == prepare.series_sha256(project / "patches")


def test_patch_that_does_not_apply_is_named(project: Path) -> None:
    (project / "patches" / "change-a-line.patch").write_text(PATCH.replace("three", "gone"))
    done = run_tree(project)
    assert done.returncode != 0
    assert "change-a-line.patch does not apply" in done.stderr
    assert not (project / "build" / "llama.cpp.stamp").exists()


def test_patch_missing_from_the_folder_is_named(project: Path) -> None:
    (project / "patches" / "change-a-line.patch").unlink()
    done = run_tree(project)
    assert done.returncode != 0
    assert "change-a-line.patch" in done.stderr


def test_removed_tree_is_made_again(project: Path) -> None:
    run_tree(project)
    tree = project / "build" / "llama.cpp"
    shutil.rmtree(tree)
    assert run_tree(project).returncode == 0
    assert (tree / "src" / "file.txt").is_file()


def test_changed_series_starts_from_the_pristine_tree_and_touches_little(project: Path) -> None:
    run_tree(project)
    tree = project / "build" / "llama.cpp"
    header = (tree / "include" / "llama.h").stat().st_mtime_ns
    patched = (tree / "src" / "file.txt").stat().st_mtime_ns
    (tree / "src" / "left-over.cpp").write_text("")
    (project / "patches" / "change-a-line.patch").write_text(PATCH.replace("drei", "trois"))
    assert run_tree(project).returncode == 0
    assert (tree / "src" / "file.txt").read_text() == FILE_BEFORE.replace("three", "trois")
    assert (tree / "src" / "file.txt").stat().st_mtime_ns > patched
    assert (tree / "include" / "llama.h").stat().st_mtime_ns == header
    assert not (tree / "src" / "left-over.cpp").exists()


def test_local_tree_is_copied_and_left_alone(project: Path, tmp_path: Path) -> None:
    local = tmp_path / "my llama.cpp"
    for name, text in {"include/llama.h": "// mine", "src/file.txt": FILE_BEFORE}.items():
        (local / name).parent.mkdir(parents=True)
        (local / name).write_text(text)
    done = run_tree(project, "--local", str(local))
    assert done.returncode == 0, done.stderr
    assert (project / "build" / "llama.cpp" / "include" / "llama.h").read_text() == "// mine"
    assert "drei" in (project / "build" / "llama.cpp" / "src" / "file.txt").read_text()
    assert (local / "src" / "file.txt").read_text() == FILE_BEFORE


def test_local_folder_without_llama_cpp_is_refused(project: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    done = run_tree(project, "--local", str(tmp_path / "empty"))
    assert done.returncode != 0
    assert "include/llama.h is missing" in done.stderr


def test_changed_archive_is_not_used(project: Path) -> None:
    archive = project / "cache" / "fake_cpp-1.0.tar.gz"
    archive.write_bytes(archive.read_bytes() + b"\0")
    done = run_tree(project)
    assert done.returncode != 0
    assert "pip could not download fake-cpp==1.0" in done.stderr


# what an install holds


def test_subpackages_have_one_import_name() -> None:
    import melt_edge.export
    import melt_edge.runtime

    assert Path(melt_edge.export.__path__[0]).name == "export"
    assert Path(melt_edge.runtime.__path__[0]).name == "runtime"


def test_each_library_is_installed_once() -> None:
    from melt_edge.runtime.library import native_dir

    names = {"darwin": "lib{}.dylib", "win32": "{}.dll"}.get(sys.platform, "lib{}.so")
    files = {path.name for path in native_dir().iterdir()}
    assert {names.format(stem) for stem in ("llama", "ggml", "ggml-base", "ggml-cpu")} <= files
    assert not any(path.is_symlink() for path in native_dir().iterdir())
    assert not [name for name in files if re.search(r"\.so\.\d|\.\d+\.dylib", name)]


def test_repository_names_no_registry_and_no_machine() -> None:
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split(
        "\n"
    )
    # put together here, so that this file does not hold them
    forbidden = re.compile(
        "|".join(["pypi" + r"\.org", "python" + "hosted", "index-" + "url", "/" + "tmp/w", "/" + "root/"])
    )
    found = []
    for name in filter(None, listed):
        path = ROOT / name
        if path.is_file() and b"\0" not in (data := path.read_bytes()):
            found += [f"{name}: {hit}" for hit in forbidden.findall(data.decode(errors="replace"))]
    assert found == []
