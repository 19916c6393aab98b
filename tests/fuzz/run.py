"""Runs seeded mutants of a valid file through melt_edge.load and a short generation, in child processes.

    python -m tests.fuzz.run --arch melt --seed 17          one mutant again, by its seed
    python -m tests.fuzz.run --arch ouro --count 2000
    python -m tests.fuzz.run --arch melt --onnx             of an ONNX folder instead of a file

A mutant passes if it ends in a working model (finite logits, text) or in one of melt_edge's errors.
A killed or hanging worker is charged to the mutant it was at, and a new one goes on with the next.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import json
import queue
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

SECONDS_PER_MUTANT = 20.0
SECONDS_TO_START = 120.0
# What a tiny model and the imported libraries need is far less; a mutant that takes more fills memory.
PEAK_BYTES = 1500 * 2**20
TESTS = Path(__file__).resolve().parent.parent


@dataclass
class Verdict:
    """How one mutant ended: works, refused, untyped, killed, hangs or fills memory."""

    seed: int
    end: str
    what: str
    words: str
    seconds: float = 0.0
    peak_bytes: int = 0

    @property
    def is_good(self) -> bool:
        """True for the two ends a mutant may have."""
        return self.end in ("works", "refused")


def run_mutants(base: Path, seeds: Iterable[int], *, check_only: bool = False, n_workers: int = 2) -> list[Verdict]:
    """Try the mutants of a valid file or ONNX folder; returns one verdict per seed, in the order of the seeds."""
    todo: queue.Queue[int] = queue.Queue()
    for seed in seeds:
        todo.put(seed)
    verdicts: list[Verdict] = []
    with tempfile.TemporaryDirectory() as folder:
        scratch = [Path(folder) / f"mutant-{i}{base.suffix}" for i in range(n_workers)]
        with ThreadPoolExecutor(n_workers) as pool:
            for done in [pool.submit(_drain, base, path, todo, verdicts, check_only) for path in scratch]:
                done.result()
    return sorted(verdicts, key=lambda verdict: verdict.seed)


def _drain(base: Path, scratch: Path, todo: queue.Queue[int], verdicts: list[Verdict], check_only: bool) -> None:
    worker: _Worker | None = None
    try:
        while True:
            try:
                seed = todo.get_nowait()
            except queue.Empty:
                return
            if worker is None:
                worker = _Worker(base, scratch, check_only)
            verdict = worker.try_seed(seed)
            verdicts.append(verdict)
            if verdict.end in ("killed", "hangs", "fills memory"):
                worker.stop()
                worker = None
    finally:
        if worker is not None:
            worker.stop()


class _Worker:
    """One child process and the thread that reads its lines."""

    def __init__(self, base: Path, scratch: Path, check_only: bool) -> None:
        start = f"import sys; sys.path.insert(0, {str(TESTS)!r}); from fuzz.worker import main; main()"
        command = [sys.executable, "-c", start, str(base.resolve()), str(scratch)]
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115 - lives as long as the process
        self._process = subprocess.Popen(
            command + (["--check-only"] if check_only else []),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            text=True,
            cwd=scratch.parent,  # in the repository's root its melt_edge/ would hide the installed package
        )
        self._lines: queue.Queue[dict[str, Any] | None] = queue.Queue()
        self._is_new = True
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            if line.startswith("{"):  # the native library may print to stdout as well
                self._lines.put(json.loads(line))
        self._lines.put(None)

    def try_seed(self, seed: int) -> Verdict:
        """Let the child try one mutant, and wait for its verdict or its death."""
        assert self._process.stdin is not None
        limit = SECONDS_PER_MUTANT + (SECONDS_TO_START if self._is_new else 0.0)
        has_begun = not self._is_new
        self._is_new = False
        deadline = time.monotonic() + limit
        try:
            self._process.stdin.write(f"{seed}\n")
            self._process.stdin.flush()
            while True:
                report = self._lines.get(timeout=max(0.0, deadline - time.monotonic()))
                if report is None:
                    words = f"exit status {self._process.wait()}; {self._last_words()}"
                    if not has_begun:
                        raise RuntimeError(f"the worker does not start: {words}")
                    return Verdict(seed, "killed", "", words)
                has_begun = True
                if "end" in report:
                    verdict = Verdict(**report)
                    if verdict.peak_bytes > PEAK_BYTES:
                        verdict.end, verdict.words = "fills memory", f"{verdict.peak_bytes} bytes; {verdict.words}"
                    return verdict
        except queue.Empty:
            return Verdict(seed, "hangs", "", f"no end after {limit:.0f} s; {self._last_words()}", limit)
        except BrokenPipeError:
            return Verdict(seed, "killed", "", f"exit status {self._process.wait()}; {self._last_words()}")

    def _last_words(self) -> str:
        self._errors.seek(0)
        return self._errors.read()[-600:].decode(errors="replace").strip()

    def stop(self) -> None:
        """End the child, by its own process id."""
        self._process.kill()
        self._process.wait()
        self._errors.close()
        for stream in (self._process.stdin, self._process.stdout):
            if stream is not None:
                with contextlib.suppress(BrokenPipeError):
                    stream.close()


def make_base(arch: str, folder: Path) -> Path:
    """A valid file of the architecture, as small as can be with every key and tensor an export writes."""
    from melt_edge.export.gguf import export_gguf
    from tiny import tiny_checkpoint, tiny_config

    config = tiny_config(arch, num_loops=2, max_position_embeddings=128)
    checkpoint = tiny_checkpoint(folder / "checkpoint", config, seed=1)
    path = folder / f"{arch}.gguf"
    export_gguf(checkpoint, path, type="f32", verify=False)
    return path


def make_onnx_base(arch: str, folder: Path, **options: Any) -> Path:
    """A valid ONNX folder of the architecture, as small as can be. options: of export_onnx."""
    from melt_edge.export.onnx import export_onnx
    from tiny import tiny_checkpoint, tiny_config

    config = tiny_config(arch, num_loops=2, max_position_embeddings=64)
    checkpoint = tiny_checkpoint(folder / "checkpoint", config, seed=1)
    export_onnx(checkpoint, folder / f"{arch}-onnx", verify=False, **options)
    return folder / f"{arch}-onnx"


def describe(verdict: Verdict, base: Path) -> str:
    """The verdict in one line, with what the mutation was even if the worker could not say."""
    from .draft import Draft
    from .mutate import Mutator
    from .onnx_mutate import OnnxMutator

    mutator = OnnxMutator(base) if base.is_dir() else Mutator(Draft.read(base))
    with tempfile.TemporaryDirectory() as folder:
        what = verdict.what or mutator.write(verdict.seed, Path(folder) / "mutant")
    return f"seed {verdict.seed}: {verdict.end} in {verdict.seconds:.2f} s | {what} | {verdict.words[-700:]}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arch", choices=("ouro", "melt"), required=True)
    parser.add_argument("--seed", type=int, help="this mutant alone")
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--count", type=int, default=2000)
    parser.add_argument("--onnx", action="store_true", help="mutants of an ONNX folder")
    parser.add_argument("--precision", default="fp32", help="of that folder")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--check-only", action="store_true", help="only the check in Python, without the library")
    parser.add_argument("--verbose", action="store_true", help="every mutant, not just the bad ones")
    args = parser.parse_args()
    seeds = range(args.first, args.first + args.count) if args.seed is None else [args.seed]
    start = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        if args.onnx:
            base = make_onnx_base(args.arch, Path(folder), precision=args.precision)
        else:
            base = make_base(args.arch, Path(folder))
        verdicts = run_mutants(base, seeds, check_only=args.check_only, n_workers=args.workers)
        for verdict in verdicts:
            if args.verbose or args.seed is not None or not verdict.is_good:
                sys.stdout.write(describe(verdict, base) + "\n")
    ends = collections.Counter(verdict.end for verdict in verdicts)
    sys.stdout.write(f"{args.arch}: {len(verdicts)} mutants in {time.monotonic() - start:.0f} s: {dict(ends)}\n")
    sys.exit(0 if all(verdict.is_good for verdict in verdicts) else 1)


if __name__ == "__main__":
    sys.path.insert(0, str(TESTS))
    main()
