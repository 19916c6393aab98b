"""melt-edge: looped language models with a shared KV cache, on laptops and phones.

``load`` opens a GGUF file and returns a ``Model``. Importing this package loads neither torch nor the
native library; the first ``load`` does the latter.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

from melt_edge import errors

if TYPE_CHECKING:
    from melt_edge.runtime.loading import load
    from melt_edge.runtime.model import Model

__version__: str
__all__ = ["Model", "__version__", "errors", "load"]

# A library stays silent unless the program asks for its log.
logging.getLogger("melt_edge").addHandler(logging.NullHandler())


def __getattr__(name: str) -> Any:
    if name == "load":
        from melt_edge.runtime.loading import load

        return load
    if name == "Model":
        from melt_edge.runtime.model import Model

        return Model
    if name == "__version__":
        from importlib.metadata import PackageNotFoundError, version

        try:
            return version("melt-edge")
        except PackageNotFoundError:  # run from a source tree without an install
            return "0+source"
    raise AttributeError(f"module 'melt_edge' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
