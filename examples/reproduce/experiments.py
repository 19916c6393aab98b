"""The rows of the table: what is measured, and how each student differs from MELT."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from melt_edge.distill.settings import Settings

# The task that the shipped teacher learned, with as many steps as it was trained for.
TASK = "pointers"
MAX_STEPS = 4
NUM_LOOPS = 4


@dataclass(frozen=True)
class Experiment:
    """A row. loops: of the teacher, without training; changes: a student's settings that differ from MELT's.

    paper: what the paper reports for it. main: trained with every seed.
    """

    key: str
    name: str
    paper: str = ""
    main: bool = False
    loops: int | None = None
    shared: bool = False
    changes: Mapping[str, Any] | None = field(default=None)


# The whole sequence as one chunk.
_WHOLE = {"chunk_size": [0]}

EXPERIMENTS = (
    *(
        Experiment(
            f"teacher-{n}", f"teacher (Ouro), T = {n}", main=True, loops=n, paper="62.3" if n == NUM_LOOPS else ""
        )
        for n in range(1, NUM_LOOPS + 1)
    ),
    Experiment("untrained", "teacher, one row for all loops, no training", main=True, loops=NUM_LOOPS, shared=True),
    Experiment("melt", "MELT", "59.9", main=True, changes={}),
    Experiment("no-transition", "without the transition", "about 10 points lost", changes={"transition_steps": 0}),
    Experiment(
        "no-alignment",
        "without the attention alignment",
        "2 to 3 points lost",
        changes={"beta": 0.0, "transition_beta": 0.0},
    ),
    Experiment("whole", "without chunk-wise training", "0 %", changes=_WHOLE),
    Experiment("scalar", "scalar gate", "8 to 10 points lost", changes={"gate": "scalar"}),
    Experiment("mean", "mean of the loops", "8 to 10 points lost", changes={"gate": "mean"}),
    Experiment("ema", "moving average of the loops", "8 to 10 points lost", changes={"gate": "ema"}),
    Experiment("last-loop", "last loop's row", "8 to 10 points lost", changes={"gate": "none"}),
)


def student_settings(base: Settings, changes: Mapping[str, Any], seed: int) -> Settings:
    """A student's settings; every student gets as many optimizer steps as MELT."""
    changed = base.changed({**changes, "seed": seed}, source="the row")
    rest = base.total_steps - changed.transition_steps
    return changed.changed({"alignment_steps": rest}, source="the row")
