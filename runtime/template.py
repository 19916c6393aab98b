"""Renders a model file's chat template without trusting it.

A template is a program from a stranger. jinja2's sandbox keeps it from other objects but not from time
or memory, so it runs in a process of its own that the system stops at 2 s and 256 MB.
"""

from __future__ import annotations

import importlib.util
import json
import multiprocessing.spawn
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from melt_edge.errors import BackendError, ConfigError, FormatError

LIMIT_S = 2.0
LIMIT_BYTES = 256 * 2**20
MAX_MESSAGES = 4096
MAX_PROMPT_BYTES = 16 * 2**20
# Starting the interpreter and importing jinja2 comes before the template's own 2 s.
_START_S = 20.0
# What the worker writes once it has all it needs, before the limits begin.
READY = b"ready\n"
_WORKER = Path(__file__).with_name("template_worker.py")


def render_chat(
    template: str,
    messages: Sequence[Mapping[str, Any]],
    *,
    bos_token: str,
    eos_token: str,
    add_generation_prompt: bool = True,
    source: str = "chat template",
) -> str:
    """The prompt text for these messages, as Hugging Face's chat templates are rendered.

    source: named in messages, usually the model's path.
    Raises: ConfigError for messages of another shape or refused by the template; FormatError for a
        template that fails, or needs more than 2 s or 256 MB; BackendError if its process cannot start.
        That is a Python interpreter: the running one, or in a program that embeds Python the one named with
        multiprocessing.set_executable.
    """
    request = {
        "template": template,
        "limit_s": LIMIT_S,
        "limit_bytes": LIMIT_BYTES,
        "variables": {
            "messages": checked_messages(messages),
            "bos_token": bos_token,
            "eos_token": eos_token,
            "add_generation_prompt": add_generation_prompt,
            "tools": None,
            "documents": None,
        },
    }
    reply = _ask_worker(json.dumps(request).encode("ascii"), source)
    if "prompt" in reply:
        return str(reply["prompt"])
    reason = str(reply.get("reason", ""))[:300]
    if reply.get("kind") == "refused":
        raise ConfigError(f"{source}: the chat template refuses these messages: {reason}")
    if reply.get("kind") == "memory":
        raise FormatError(_too_much(source, f"{LIMIT_BYTES // 2**20} MB of memory"))
    raise FormatError(f"{source}: the chat template does not work ({reason}); use generate with a prompt of your own")


def checked_messages(messages: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The messages as plain dictionaries with role and content texts.

    Raises: ConfigError naming the first message that is something else.
    """
    if isinstance(messages, (str, bytes, Mapping)) or not isinstance(messages, Sequence):
        raise ConfigError(f"messages is {type(messages).__name__}, expected a list of {{'role': ..., 'content': ...}}")
    if not 1 <= len(messages) <= MAX_MESSAGES:
        raise ConfigError(f"messages has {len(messages)} entries, expected 1 to {MAX_MESSAGES}")
    checked = []
    for at, message in enumerate(messages):
        if not isinstance(message, Mapping):
            raise ConfigError(f"messages[{at}] is {type(message).__name__}, expected {{'role': ..., 'content': ...}}")
        for key in ("role", "content"):
            if not isinstance(message.get(key), str):
                raise ConfigError(f"messages[{at}] has {key} {message.get(key)!r}, expected text")
        try:
            json.dumps(dict(message))
        except (TypeError, ValueError, RecursionError) as err:
            raise ConfigError(f"messages[{at}] holds values that are not plain data ({err})") from err
        checked.append(dict(message))
    return checked


def _ask_worker(request: bytes, source: str) -> dict[str, Any]:
    try:
        done = subprocess.run(_command(), input=request, capture_output=True, timeout=_START_S + LIMIT_S, check=False)
    except subprocess.TimeoutExpired as err:
        if not (err.stdout or b"").startswith(READY):
            raise BackendError(_no_start(f"it took more than {_START_S:g} s")) from None
        raise FormatError(_too_much(source, f"{LIMIT_S:g} s")) from None
    except OSError as err:
        raise BackendError(_no_start(str(err))) from err
    if not done.stdout.startswith(READY):
        last = done.stderr.decode("utf-8", errors="replace").strip().rpartition("\n")[2]
        raise BackendError(_no_start(last[:300] or f"exit status {done.returncode}"))
    if done.returncode != 0:
        # Stopped by the system: the alarm for time; memory that Python could not report as such.
        what = f"{LIMIT_S:g} s" if done.returncode == -14 else f"{LIMIT_S:g} s or {LIMIT_BYTES // 2**20} MB of memory"
        raise FormatError(_too_much(source, what))
    if len(done.stdout) > MAX_PROMPT_BYTES:
        raise FormatError(_too_much(source, f"{MAX_PROMPT_BYTES // 2**20} MB of text"))
    reply = json.loads(done.stdout.removeprefix(READY))
    assert isinstance(reply, dict)
    return reply


def _command() -> list[str]:
    """The worker's command line. Raises: BackendError if this process has no Python interpreter to start."""
    chosen = multiprocessing.spawn.get_executable() or ""
    python = os.fsdecode(chosen)
    is_python = Path(python).name.lower().startswith(("python", "pypy", "graalpy"))
    if not is_python or (getattr(sys, "frozen", False) and python == sys.executable):
        raise BackendError(
            f"the chat template needs a Python interpreter of its own, and this program ({python or 'unnamed'}) is "
            "none; name one with multiprocessing.set_executable, or use generate with a prompt of your own"
        )
    # -I: no PYTHON* variables, no user site, and the current folder is not searched for modules. jinja2 may
    # be in one of those places, so the worker is told where this process finds it.
    specs = [importlib.util.find_spec(name) for name in ("jinja2", "markupsafe")]
    folders = [str(Path(spec.origin).parent.parent) for spec in specs if spec is not None and spec.origin]
    return [python, "-I", str(_WORKER), *folders]


def _no_start(reason: str) -> str:
    return f"the chat template's process cannot be started ({reason}); use generate with a prompt of your own"


def _too_much(source: str, what: str) -> str:
    return (
        f"{source}: the chat template needs more than {what}, which no honest one does; "
        "use generate with a prompt of your own"
    )
