"""Child processes that measure: what they say as they say it, and one sentence for however they end."""

from __future__ import annotations

import json
import signal
import subprocess
import tempfile
import threading
from collections.abc import Generator, Sequence
from typing import Any


def replies(command: Sequence[str], *, limit_s: float) -> Generator[dict[str, Any], None, None]:
    """The JSON objects that a command prints, one a line, as it prints them.

    A child that ends in any other way than well gives a last {"error": sentence}, once, and so does one that says
    nothing. limit_s: seconds after which it is ended. Closing the iterator (Ctrl-C) ends the child.
    """
    # -m looks for modules in the current folder first: an empty one of ours
    with (
        tempfile.TemporaryDirectory(prefix="melt-edge-") as folder,
        tempfile.TemporaryFile() as errors,
        subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors, cwd=folder) as process,
    ):
        late = threading.Event()

        def end() -> None:
            late.set()
            process.kill()

        timer = threading.Timer(limit_s, end)
        timer.start()
        last: dict[str, Any] = {}
        try:
            assert process.stdout is not None
            for line in process.stdout:
                reply = _parsed(line)
                if reply is not None:
                    last = reply
                    yield reply
            status = process.wait()
        finally:
            timer.cancel()
            process.kill()
        if "error" in last:
            return
        if late.is_set():
            yield {"error": f"took longer than {limit_s:g} s; give it more with --time-limit"}
        elif status != 0 or not last:
            errors.seek(0)
            yield {"error": _death(status, errors.read())}


def _parsed(line: bytes) -> dict[str, Any] | None:
    """The JSON object of a line; None for anything else that was printed."""
    try:
        reply = json.loads(line)
    except ValueError:
        return None
    return reply if isinstance(reply, dict) else None


def _death(status: int, errors: bytes) -> str:
    """Why a child that gave no numbers ended."""
    if status < 0:
        try:
            name = signal.Signals(-status).name
        except ValueError:
            name = f"signal {-status}"
        memory = ", as the system does when memory runs out" if name == "SIGKILL" else ""
        return f"the process was ended by {name}{memory}"
    last = errors.decode("utf-8", errors="replace").strip().rpartition("\n")[2]
    return f"the process ended with status {status} ({last[:300] or 'it said nothing'})"
