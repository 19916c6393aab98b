"""Comma-separated lists of the measuring commands, and what their JSON says of the machine."""

from __future__ import annotations

import platform
import re
from collections.abc import Sequence
from typing import Any

import typer

from melt_edge.errors import BackendUnavailableError


def names(text: str) -> list[str]:
    """The names of a list, each once, in lower case."""
    return list(dict.fromkeys(part.strip().lower() for part in text.split(",")))


def numbers(name: str, text: str, high: int, *, low: int = 1) -> list[int]:
    """The whole numbers of a list such as 1,2,4 or 1k,16k, from low to high."""
    found = []
    for part in names(text):
        match = re.fullmatch(r"([0-9]{1,9})(k?)", part)
        number = int(match[1]) * (1024 if match[2] else 1) if match else low - 1
        if not low <= number <= high:
            raise typer.BadParameter(f"{name} is {text!r}, expected numbers from {low} to {high} such as 1,4 or 1k,16k")
        found.append(number)
    return found


def check_names(kv_types: Sequence[str], backends: Sequence[str]) -> None:
    """Raises: BadParameter for a cache type and BackendUnavailableError for a backend that there is none of."""
    from melt_edge.runtime.loading import BACKENDS
    from melt_edge.runtime.memory import KV_TYPES

    for name in kv_types:
        if name not in KV_TYPES:
            raise typer.BadParameter(f"--kv-type is {name!r}, expected some of {', '.join(KV_TYPES)}")
    for name in backends:
        if name not in BACKENDS:
            raise BackendUnavailableError(f"backend is {name!r}, expected {' or '.join(BACKENDS)}")


def about() -> dict[str, Any]:
    """The version and the machine."""
    from melt_edge import __version__
    from melt_edge.runtime.machine import usable_cores

    machine = {"system": platform.system(), "arch": platform.machine(), "cores": usable_cores()}
    return {"melt_edge": __version__, "machine": machine}
