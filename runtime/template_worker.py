"""Runs as a script in a process of its own: one chat template, rendered under limits, as JSON on stdout.

Its arguments are folders to look for jinja2 in, after the interpreter's own. Imports nothing of melt_edge:
it has to start fast and hold as little as possible.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
from datetime import datetime
from typing import Any

sys.path.extend(sys.argv[1:])

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.parser
import jinja2.sandbox


class Refusal(Exception):
    """The template called raise_exception."""


class GenerationTag(jinja2.ext.Extension):
    """Passes Hugging Face's {% generation %} block through; it only matters for training."""

    tags = {"generation"}  # noqa: RUF012 (jinja2 declares it so)

    def parse(self, parser: jinja2.parser.Parser) -> list[jinja2.nodes.Node]:
        """The block's body, without the tags."""
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def render(template: str, variables: dict[str, Any]) -> str:
    """The rendered text, with the settings Hugging Face renders chat templates with."""
    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[GenerationTag, jinja2.ext.loopcontrols]
    )
    environment.filters["tojson"] = to_json
    environment.globals["raise_exception"] = refuse
    environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
    return environment.from_string(template).render(**variables)


def to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """JSON without jinja2's HTML escapes, as Hugging Face's templates expect it."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def refuse(message: str) -> None:
    """What templates call raise_exception."""
    raise Refusal(message)


def limit(seconds: float, max_bytes: int) -> None:
    """From here on the system kills this process after ``seconds``, or fails its allocations.

    Windows has neither call; there the parent's own timeout is what ends a template.
    """
    if sys.platform == "win32":
        return
    import resource
    import signal

    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    with contextlib.suppress(ValueError, OSError):  # macOS has no such limit; the seconds remain
        resource.setrlimit(resource.RLIMIT_AS, (max_bytes, max_bytes))


def main() -> None:
    """Read a request on stdin, write "ready" and then the reply on stdout."""
    request = json.load(sys.stdin.buffer)
    sys.stdout.buffer.write(b"ready\n")
    sys.stdout.buffer.flush()
    limit(request["limit_s"], request["limit_bytes"])
    try:
        reply = {"prompt": render(request["template"], request["variables"])}
    except Refusal as err:
        reply = {"kind": "refused", "reason": str(err)}
    except MemoryError:
        reply = {"kind": "memory"}
    except Exception as err:  # a stranger's program may raise anything
        reply = {"kind": "failed", "reason": f"{type(err).__name__}: {err}"}
    sys.stdout.buffer.write(json.dumps(reply).encode("ascii"))
    sys.stdout.buffer.flush()
    os._exit(0)  # no clean-up code of objects the template made


if __name__ == "__main__":
    main()
