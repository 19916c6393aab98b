"""How a command ends: one line on standard error and the exit code, a traceback only with --debug.

0 done, 1 it failed, 2 the command was written wrongly, 130 Ctrl-C, 141 the reader of our output went away.
"""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Sequence
from typing import Any

import typer
from typer.core import TyperGroup

from melt_edge.cli.console import error_line
from melt_edge.errors import MeltError

EXIT_FAILED, EXIT_USAGE, EXIT_INTERRUPTED, EXIT_PIPE = 1, 2, 130, 141

_ORDER = (
    "demo",
    "export",
    "quantize",
    "distill",
    "inspect",
    "run",
    "chat",
    "serve",
    "eval",
    "perplexity",
    "kl",
    "compare",
)
# UsageError itself moved between typer's releases; it has always been the base of BadParameter.
_UsageError: type[Any] = typer.BadParameter.__bases__[0]


class _Debug:
    """Whether --debug was given to the command that runs."""

    wanted = False


def want_debug(wanted: bool) -> bool:
    """Callback of --debug."""
    _Debug.wanted = _Debug.wanted or wanted
    return wanted


class MeltGroup(TyperGroup):
    """The root command: runs a command line and turns what went wrong into one line and an exit code."""

    def list_commands(self, ctx: Any) -> list[str]:
        """The commands in the order a newcomer meets them (typer puts groups last)."""
        return sorted(self.commands, key=lambda name: _ORDER.index(name) if name in _ORDER else len(_ORDER))

    def main(self, args: Sequence[str] | None = None, *, standalone_mode: bool = True, **extra: Any) -> Any:  # type: ignore[override]
        """Run the command line ``args`` (default: the process's) and exit.

        Raises: SystemExit with the exit code; with ``standalone_mode`` false whatever the command raised.
        """
        if not standalone_mode:
            return super().main(args, standalone_mode=False, **extra)
        _Debug.wanted = False
        try:
            code = self._run(args, **extra)
            sys.stdout.flush()
        except BrokenPipeError:
            code = EXIT_PIPE
            _silence_stdout()
        sys.exit(code)

    def _run(self, args: Sequence[str] | None, **extra: Any) -> int:
        try:
            result = super().main(args, standalone_mode=False, **extra)
            return result if isinstance(result, int) else 0
        except (KeyboardInterrupt, typer.Abort):
            sys.stderr.write("\n")
            return EXIT_INTERRUPTED
        except BrokenPipeError:
            raise
        except SystemExit as stop:  # typer ends a command itself when its output is a closed pipe
            if isinstance(stop.__context__, BrokenPipeError):
                raise BrokenPipeError from stop
            raise
        except _UsageError as usage:
            return _report_usage(usage)
        except MeltError as failure:
            _report(str(failure))
        except (OSError, MemoryError) as failure:
            _report(_system_message(failure))
        except Exception as failure:
            _report(f"unexpected {type(failure).__name__}: {failure}; add --debug for the traceback to report")
        return EXIT_FAILED


def _report(message: str) -> None:
    if _Debug.wanted:
        import traceback

        traceback.print_exc()
    error_line(message)


def _report_usage(usage: Any) -> int:
    if type(usage).__name__ == "NoArgsIsHelpError":
        # A bare `melt-edge` asks for help; with rich, making the exception has printed it already.
        sys.stdout.write(usage.message)
        return 0
    message = usage.format_message().strip().rstrip(".")
    command = usage.ctx.command_path if usage.ctx is not None else "melt-edge"
    error_line(f"{message[:1].lower()}{message[1:]}; see {command} --help")
    return EXIT_USAGE


def _system_message(failure: BaseException) -> str:
    if isinstance(failure, OSError):
        reason = failure.strerror or str(failure)
        return reason if failure.filename is None else f"{failure.filename}: {reason}"
    if isinstance(failure, MemoryError):
        return f"out of memory {failure}".strip()
    return str(failure)


def _silence_stdout() -> None:
    # The interpreter flushes stdout once more when it ends and would complain about the closed pipe.
    with contextlib.suppress(OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
