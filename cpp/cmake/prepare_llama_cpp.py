"""Prepares the patched llama.cpp tree: fetch the pinned archive, check its sha256, apply cpp/patches.

Called by cpp/CMakeLists.txt at configure time and by the Makefile; standard library only, no git
repository needed around it. Commands:

    fetch                    print the path of the cached, checked source distribution
    tree DEST [--local DIR]  make DEST the patched tree (of DIR, which stays as it is) and print the series' hash
"""

from __future__ import annotations

import argparse
import filecmp
import hashlib
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

CPP_DIR = Path(__file__).resolve().parent.parent


def read_lock(path: Path) -> dict[str, str]:
    """The ``key = value`` lines of the lock file."""
    lines = (line.split("#")[0].partition("=") for line in path.read_text().splitlines())
    return {key.strip(): value.strip() for key, equals, value in lines if equals}


def read_series(patches: Path) -> list[Path]:
    """The patches in the order in which they apply."""
    names = (line.split("#")[0].strip() for line in (patches / "series").read_text().splitlines())
    return [patches / name for name in names if name]


def series_sha256(patches: Path) -> str:
    """Changes with the name, the order and every byte of the patches."""
    digest = hashlib.sha256()
    for patch in read_series(patches):
        if not patch.is_file():
            raise SystemExit(f"error: cpp/patches/series lists {patch.name}, but that file does not exist")
        digest.update(f"{patch.name}\n".encode() + patch.read_bytes())
    return digest.hexdigest()


def file_sha256(path: Path) -> str:
    """The sha256 of a file, read in pieces."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while piece := file.read(1 << 20):
            digest.update(piece)
    return digest.hexdigest()


def cache_dir() -> Path:
    """$MELT_CACHE_DIR, or the user's cache folder: it outlives build folders."""
    if own := os.environ.get("MELT_CACHE_DIR"):
        return Path(own)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "melt-edge"


def fetch(lock: dict[str, str]) -> Path:
    """The pinned source distribution, downloaded once by the ordinary pip client and checked on every use."""
    name = f"{lock['package'].replace('-', '_')}-{lock['version']}.tar.gz"
    cached = cache_dir() / name
    if cached.is_file() and file_sha256(cached) == lock["sha256"]:
        return cached
    cached.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=cached.parent) as scratch:
        wanted = Path(scratch, "requirements.txt")
        wanted.write_text(f"{lock['package']}=={lock['version']} --hash=sha256:{lock['sha256']}\n")
        # pip asks a source distribution for its metadata; without build isolation that takes seconds, and
        # its build backend is our own as well, so it is here already.
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--no-binary", ":all:"]
        command += ["--no-build-isolation", "--require-hashes", "--dest", scratch, "-r", str(wanted)]
        if subprocess.run(command, stdout=sys.stderr).returncode != 0:
            raise SystemExit(
                f"error: pip could not download {lock['package']}=={lock['version']} with sha256 {lock['sha256']}; "
                f"see its message above, or put the file at {cached}, or set MELT_LLAMA_CPP_DIR to a llama.cpp tree"
            )
        os.replace(Path(scratch, name), cached)
    return cached


def extract(archive: Path, subdir: str, dest: Path) -> None:
    """Unpacks one folder of the archive, without its leading path; links and odd names are left out."""
    with tarfile.open(archive) as tar:
        for member in tar:
            inside = member.name.partition("/")[2]
            if member.isfile() and inside.startswith(subdir + "/") and ".." not in inside.split("/"):
                member.name = inside[len(subdir) + 1 :]
                if member.name == ".git":  # a submodule's link to a repository that is not here breaks git
                    continue
                member.mode = 0o755 if member.mode & 0o100 else 0o644
                if hasattr(tarfile, "data_filter"):
                    tar.extract(member, dest, filter="data")
                else:
                    tar.extract(member, dest)


def apply_series(patches: Path, tree: Path) -> None:
    """Applies every patch to a pristine tree. Raises: SystemExit with the patch's name if one does not apply."""
    # Inside another repository `git apply` exits 0 and changes nothing: hide the one around the build folder.
    env = {**os.environ, "GIT_CEILING_DIRECTORIES": str(tree.parent)}
    for patch in read_series(patches):
        command = ["git", "apply", "--whitespace=nowarn", str(patch)]
        try:
            done = subprocess.run(command, cwd=tree, env=env, capture_output=True, text=True)
        except FileNotFoundError:
            raise SystemExit("error: git, which applies cpp/patches, was not found: please install it") from None
        if done.returncode != 0:
            raise SystemExit(f"error: {patch.name} does not apply to the llama.cpp tree:\n{done.stderr.strip()}")


def sync(fresh: Path, dest: Path) -> None:
    """Makes dest equal to fresh, touching only files that differ, so that a new patch recompiles little."""
    wanted = {path.relative_to(fresh) for path in fresh.rglob("*") if path.is_file()}
    for path in [path for path in dest.rglob("*") if path.is_file()]:
        if path.relative_to(dest) not in wanted:
            path.unlink()
    for name in wanted:
        target = dest / name
        if not (target.is_file() and filecmp.cmp(fresh / name, target, shallow=False)):
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(fresh / name, target)  # copy, not copy2: a changed file must be newer than its object


def tree(lock: dict[str, str], patches: Path, dest: Path, local: Path | None) -> str:
    """Makes dest the patched tree and returns the series' sha256; does nothing if its stamp says it is."""
    series = series_sha256(patches)
    stamp = dest.parent / f"{dest.name}.stamp"
    now = f"{lock['sha256']} {series}"
    if local is None and dest.is_dir() and stamp.is_file() and stamp.read_text() == now:
        return series
    stamp.unlink(missing_ok=True)
    dest.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=dest.parent) as scratch:
        fresh = Path(scratch, "llama.cpp")
        if local is None:
            extract(fetch(lock), lock["subdir"], fresh)
        else:
            shutil.copytree(local, fresh, symlinks=True, ignore=shutil.ignore_patterns(".git", "build*"))
        if not (fresh / "include" / "llama.h").is_file():
            raise SystemExit(f"error: {local or lock['package']} holds no llama.cpp: include/llama.h is missing")
        apply_series(patches, fresh)
        sync(fresh, dest)
    if local is None:
        stamp.write_text(now)
    return series


def main() -> None:
    """Runs one command; its result is the only line on standard output."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lock", type=Path, default=CPP_DIR / "llama.cpp.lock")
    parser.add_argument("--patches", type=Path, default=CPP_DIR / "patches")
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("fetch")
    make_tree = commands.add_parser("tree")
    make_tree.add_argument("dest", type=Path)
    make_tree.add_argument("--local", type=Path)
    args = parser.parse_args()
    lock = read_lock(args.lock)
    if args.command == "fetch":
        print(fetch(lock))
    else:
        print(tree(lock, args.patches, args.dest.resolve(), args.local))


if __name__ == "__main__":
    main()
