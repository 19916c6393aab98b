"""Every exception melt-edge raises on purpose.

Files and user input raise one of these, with what was found, what was expected and what to do next;
``assert`` is kept for our own invariants.
"""

from __future__ import annotations


class MeltError(Exception):
    """Base of every error melt-edge raises on purpose."""


class ConfigError(MeltError, ValueError):
    """A configuration or an argument has a value that the model or the library cannot take."""


class SpecError(MeltError, ValueError):
    """The tensors of a file are not those that its configuration asks for; lists every gap."""


class FormatError(MeltError, ValueError):
    """A file is damaged, unsafe, or of another kind than its reader expects."""


class ParityError(MeltError):
    """An exported file does not compute what the reference model computes."""


class TrainingError(MeltError, RuntimeError):
    """Training cannot go on, because a loss or a gradient is no finite number."""


class ContextOverflowError(MeltError, ValueError):
    """The tokens do not fit into the context that the model was loaded with."""


class MemoryBudgetError(MeltError, MemoryError):
    """Weights, cache and buffers need more memory than the machine can give."""


class BackendError(MeltError, RuntimeError):
    """The backend refused to load a model or failed while computing."""


class BackendUnavailableError(MeltError, ImportError):
    """A package that the request needs is not installed, or is the wrong build."""


class AbiMismatchError(BackendUnavailableError):
    """The native library is not the build that these bindings were made for."""
