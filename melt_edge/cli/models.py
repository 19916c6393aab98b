"""The models of a measuring command: files that the user names, and random weights of a published size."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from melt_edge.cli.console import progress_bar
from melt_edge.cli.options import model_path
from melt_edge.config import ARCHITECTURES

if TYPE_CHECKING:
    from melt_edge.compare.points import Contender


@contextmanager
def contenders_of(
    models: Sequence[Path],
    *,
    shape: str | None,
    weights: str,
    cache_dir: Path | None,
    share_kv: bool = False,
    archs: Sequence[str] = ("ouro", "melt"),
    dense: bool = True,
) -> Iterator[list[Contender]]:
    """The files to measure; those that are only made for this run are removed at its end.

    dense: an Ouro is also the dense model of its layers.
    """
    from melt_edge.compare.points import contenders
    from melt_edge.compare.random_model import check_disk, make_folder, random_model
    from melt_edge.compare.shapes import shape_config
    from melt_edge.export.share_kv import share_kv_gguf
    from melt_edge.files import default_cache_dir

    for arch in archs:
        if arch not in ARCHITECTURES:
            raise typer.BadParameter(f"--arch is {arch!r}, expected some of {', '.join(ARCHITECTURES)}")
    folder = cache_dir or default_cache_dir()
    found: list[Contender] = []
    with ExitStack() as stack:
        for path in map(model_path, models):
            name = path.stem if all(path.stem != other.name for other in found) else str(path)
            roles = contenders(path, name, dense=dense)
            found += roles
            if share_kv and roles[-1].header.backend == "llama" and not roles[-1].config.shares_kv:
                make_folder(folder)
                check_disk(folder, path.stat().st_size)
                temporary = stack.enter_context(tempfile.TemporaryDirectory(prefix="share-kv-", dir=folder))
                found += contenders(share_kv_gguf(path, Path(temporary) / path.name), name)
        if shape is not None:
            for arch in archs:
                config = shape_config(shape, arch)
                with progress_bar() as progress:
                    file = random_model(shape, config, folder, type=weights, progress=progress)
                found += contenders(file, shape, dense=dense)
        yield found
