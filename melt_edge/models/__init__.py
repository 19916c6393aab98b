"""The small models that come with melt-edge, as package data; see README.md beside this file."""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path

from melt_edge.errors import ConfigError

# A MELT, and the Ouro that it was distilled from.
SHIPPED_MODEL, SHIPPED_TEACHER = "melt-tiny", "ouro-tiny"


def shipped_model_path(name: str = SHIPPED_MODEL) -> Path:
    """The GGUF file of a shipped model.

    Raises: ConfigError if no model of that name is shipped; it lists those that are.
    """
    folder = Path(str(files(__name__)))
    path = folder / f"{name}.gguf"
    if Path(name).name != name or not path.is_file():
        names = ", ".join(sorted(file.stem for file in folder.glob("*.gguf"))) or "none"
        raise ConfigError(f"{name!r} is not a shipped model, expected one of: {names}")
    return path
