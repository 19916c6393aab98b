"""Tries mutants one after the other and reports how each ends; run by tests.fuzz.run, one process of many.

Reads seeds from stdin, one a line. Writes a line when it begins a seed and one when that has ended, so
that its parent knows on which mutant it died or hangs.
"""

from __future__ import annotations

import argparse
import json
import logging
import math
import resource
import sys
import time
from pathlib import Path

from melt_edge.errors import MeltError
from melt_edge.runtime.gguf_check import check_gguf
from melt_edge.runtime.onnx_folder import open_folder

from .draft import Draft
from .mutate import Mutator
from .onnx_mutate import OnnxMutator

PROMPT = "What is 12 plus 30?"
# Address space, not memory: the libraries and torch alone map some gigabytes.
ADDRESS_SPACE_BYTES = 8 * 2**30


def try_file(path: Path, *, run: bool) -> tuple[str, str]:
    """How loading and running a file ends: "works", "refused" (typed), or "untyped"; and the words."""
    try:
        if run:
            _run(path)
        elif path.is_dir():
            open_folder(path).check_weights()
        else:
            check_gguf(path)
    except MeltError as err:
        return "refused", f"{type(err).__name__}: {err}"
    except Exception as err:  # whatever else comes out of it is what this looks for
        return "untyped", f"{type(err).__name__}: {err}"
    return "works", ""


def _run(path: Path) -> None:
    import melt_edge

    with melt_edge.load(path, n_threads=1) as model:
        tokens = model.tokenize(PROMPT)[:24]
        logits = model.logits(tokens)
        if not all(map(math.isfinite, logits.ravel().tolist())):
            raise ArithmeticError("the logits are not finite")
        model.generate(PROMPT, max_tokens=4, temperature=0.0)
        model.generate(PROMPT, max_tokens=4, temperature=0.8, seed=1)


def _tell(line: dict[str, object]) -> None:
    sys.stdout.write(json.dumps(line) + "\n")
    sys.stdout.flush()


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("base", type=Path)
    parser.add_argument("scratch", type=Path)
    parser.add_argument("--check-only", action="store_true")
    args = parser.parse_args()
    resource.setrlimit(resource.RLIMIT_AS, (ADDRESS_SPACE_BYTES, ADDRESS_SPACE_BYTES))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    logging.disable(logging.CRITICAL)
    mutator = OnnxMutator(args.base) if args.base.is_dir() else Mutator(Draft.read(args.base))
    for line in sys.stdin:
        seed = int(line)
        _tell({"begin": seed})
        what = mutator.write(seed, args.scratch)
        start = time.perf_counter()
        end, words = try_file(args.scratch, run=not args.check_only)
        report = {
            "seed": seed,
            "end": end,
            "what": what,
            "words": words.replace(str(args.scratch), "FILE"),
            "seconds": time.perf_counter() - start,
            "peak_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        }
        _tell(report)


if __name__ == "__main__":
    main()
