"""Several processes started by torchrun: who we are, sums over all, the student's weights in shards (FSDP2)."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn

from melt_edge.distill.student import StudentLM
from melt_edge.errors import BackendUnavailableError, ConfigError


@dataclass(frozen=True)
class World:
    """The processes of a run, and this one's device."""

    rank: int
    size: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        """True in the process that writes and prints."""
        return self.rank == 0

    def sum(self, values: Tensor) -> Tensor:
        """The sum over all processes, in each of them."""
        if self.size > 1:
            dist.all_reduce(values)
        return values

    def wait(self) -> None:
        """Wait for the other processes."""
        if self.size > 1:
            dist.barrier()


def join_world(device: str) -> World:
    """This process's place, as torchrun's environment variables give it; a world of one without them.

    device: "auto" takes CUDA, else Metal, else the CPU. Raises: ConfigError for one that is not there.
    """
    size, local_rank = int(os.environ.get("WORLD_SIZE", "1")), int(os.environ.get("LOCAL_RANK", "0"))
    chosen = pick_device(device, local_rank)
    if size == 1:
        return World(0, 1, chosen)
    if chosen.type == "mps":
        raise ConfigError("device 'mps' runs in one process; start it without torchrun or give --device cpu")
    if chosen.type == "cuda":
        torch.cuda.set_device(chosen)
    dist.init_process_group("nccl" if chosen.type == "cuda" else "gloo")
    return World(dist.get_rank(), dist.get_world_size(), chosen)


@contextmanager
def joined_world(device: str) -> Iterator[World]:
    """``join_world`` for the length of a block."""
    world = join_world(device)
    try:
        yield world
    finally:
        if world.size > 1:
            dist.destroy_process_group()


def pick_device(name: str, local_rank: int = 0) -> torch.device:
    """A device by name. Raises: ConfigError for a name that is none or a device that is not there."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    kind = name.partition(":")[0]
    there = {"cpu": True, "cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    if kind not in there:
        raise ConfigError(f"device {name!r} is unknown; expected auto, cpu, cuda or mps")
    if not there[kind]:
        raise ConfigError(f"device {name!r} is not there on this machine or in this build of torch; use --device cpu")
    return torch.device("cuda", local_rank) if name == "cuda" else torch.device(name)


def shard(student: StudentLM, world: World) -> None:
    """Split the student's weights, gradients and optimizer states over the processes."""
    if world.size == 1:
        return
    try:
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method
    except ImportError as err:
        raise BackendUnavailableError("several processes need torch 2.6 or newer; install one") from err
    mesh = init_device_mesh(world.device.type, (world.size,))
    # A layer runs loops x chunks times in a step: gathered once, its weights stay until the step ends.
    for layer in student.model.layers:
        fully_shard(layer, mesh=mesh, reshard_after_forward=False)
    fully_shard(student, mesh=mesh, reshard_after_forward=False)
    register_fsdp_forward_method(student, "chunk_logits")


def full_tensor(value: Tensor) -> Tensor:
    """A tensor put together from its shards, in every process; one that has none as it is."""
    from torch.distributed.tensor import DTensor

    return value.full_tensor() if isinstance(value, DTensor) else value


def like(value: Tensor, pattern: Tensor) -> Tensor:
    """A whole tensor sharded as another one is."""
    from torch.distributed.tensor import DTensor, distribute_tensor

    value = value.to(pattern.device)
    if isinstance(pattern, DTensor):
        return distribute_tensor(value, pattern.device_mesh, pattern.placements)
    return value


def collect(value: Tensor, world: World) -> Tensor:
    """A whole tensor on the CPU of the main process; the others help to put it together and get nothing.

    One copy of the optimizer's state is enough for a machine's memory.
    """
    whole = full_tensor(value.detach())
    return whole.cpu() if world.is_main else torch.empty(0)


def collect_weights(model: nn.Module, world: World) -> dict[str, Tensor]:
    """All weights of a model, as ``collect`` gives them."""
    return {name: collect(parameter, world) for name, parameter in model.named_parameters()}
