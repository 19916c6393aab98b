"""2 000 mutants of each architecture: a working model or a typed error, never a dead or hanging process."""

from __future__ import annotations

import collections
from pathlib import Path

import pytest

from .draft import Draft
from .mutate import Mutator
from .run import describe, make_base, run_mutants

N_MUTANTS = 2000


def test_same_seed_same_mutant_and_every_target_is_hit(melt_gguf: Path) -> None:
    mutator, again = Mutator(Draft.read(melt_gguf)), Mutator(Draft.read(melt_gguf))
    assert [mutator.mutant(seed) for seed in range(60)] == [again.mutant(seed) for seed in range(60)]
    words = "\n".join(mutator.mutant(seed)[1] for seed in range(mutator.n_targets))
    for name in [key.name for key in mutator.draft.keys] + [row.name for row in mutator.draft.rows]:
        assert f" {name}: " in words
    assert 8 * mutator.n_targets < N_MUTANTS  # so that the other kinds of damage come up too


@pytest.mark.parametrize("arch", ["ouro", "melt"])
def test_check_alone_is_typed(arch: str, tmp_path: Path) -> None:
    verdicts = run_mutants(make_base(arch, tmp_path), range(0, N_MUTANTS, 10), check_only=True)
    assert len(verdicts) == N_MUTANTS // 10
    assert not [describe(verdict, tmp_path / f"{arch}.gguf") for verdict in verdicts if not verdict.is_good]


@pytest.mark.slow
@pytest.mark.parametrize("arch", ["ouro", "melt"])
def test_mutants_work_or_are_refused(arch: str, tmp_path: Path) -> None:
    base = make_base(arch, tmp_path)
    verdicts = run_mutants(base, range(N_MUTANTS))
    assert len(verdicts) == N_MUTANTS
    assert not [describe(verdict, base) for verdict in verdicts if not verdict.is_good]
    ends = collections.Counter(verdict.end for verdict in verdicts)
    # Neither a guard that refuses everything nor one that lets everything through would pass.
    assert ends["works"] > N_MUTANTS // 20
    assert ends["refused"] > N_MUTANTS // 3
