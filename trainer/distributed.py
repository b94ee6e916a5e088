"""The processes that train one run together, started by torchrun."""

import ctypes
import os
import signal
import sys
from collections.abc import Mapping
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

_PR_SET_PDEATHSIG = 1  # from Linux' prctl.h


class Ranks:
    """This process among those that train together; with a single process every method is the identity.

    Each rank has the same number of environments. All environments together are in the order of the ranks.

    Attributes:
        rank: number of this process, from 0.
        size: number of processes.
    """

    def __init__(self, rank: int = 0, size: int = 1) -> None:
        self.rank = rank
        self.size = size
        self._is_connected = False
        self._launcher = os.getppid()

    @classmethod
    def of_torchrun(cls, timeout_seconds: float = 60.0) -> "Ranks":
        """The connected ranks of torchrun, or this process alone if torchrun did not start it.

        gloo is used for tensors on CPUs, NCCL for those on GPUs. A rank that waits longer than the timeout for
        another fails. On Linux a rank gets SIGTERM when torchrun dies.
        """
        if not dist.is_torchelastic_launched():
            return cls()
        if sys.platform == "linux":
            ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
        backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
        dist.init_process_group(backend, timeout=timedelta(seconds=timeout_seconds))
        ranks = cls(dist.get_rank(), dist.get_world_size())
        ranks._is_connected = True
        return ranks

    @property
    def has_lost_launcher(self) -> bool:
        """Whether torchrun has died since it started this rank."""
        return self._is_connected and os.getppid() != self._launcher

    @property
    def is_first(self) -> bool:
        """Whether this is the rank that serves metrics, shows progress and writes checkpoints."""
        return self.rank == 0

    def device(self, name: str) -> str:
        """The torch device for this rank; `cuda` means the GPU with this rank's number on this machine."""
        return f"cuda:{os.environ['LOCAL_RANK']}" if name == "cuda" and self.size > 1 else name

    def any(self, flag: bool) -> bool:
        """Whether `flag` holds on any rank."""
        return any(self.gather_objects(flag))

    def is_lost_rank(self, error: RuntimeError) -> bool:
        """Whether `error` came from waiting for another rank."""
        return self.size > 1 and (isinstance(error, dist.DistError) or "gloo" in str(error))

    def sum_(self, tensor: Tensor) -> Tensor:
        """Sum `tensor` over all ranks, in place; the result has the same bits on each."""
        if self.size > 1:
            dist.all_reduce(tensor)
        return tensor

    def gather(self, tensor: Tensor) -> Tensor:
        """Tensors [steps, environments, ...] of all ranks, side by side along the second axis."""
        if self.size == 1:
            return tensor
        parts = [torch.empty_like(tensor) for _ in range(self.size)]
        dist.all_gather(parts, tensor.contiguous())
        return torch.cat(parts, dim=1)

    def gather_objects(self, value: Any) -> list[Any]:
        """`value` of every rank, in order."""
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value)
        return values

    def gather_rows(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Tensors [environments, ...] of all ranks by name, concatenated in the order of the ranks."""
        if self.size == 1:
            return dict(tensors)
        # Via the CPU: a tensor from another GPU would stay there.
        of_ranks = self.gather_objects({name: tensor.cpu() for name, tensor in tensors.items()})
        return {name: torch.cat([of_rank[name] for of_rank in of_ranks]) for name in tensors}

    def own_rows(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The rows of this rank's environments, from tensors [all environments, ...] by name."""
        return {name: tensor.tensor_split(self.size)[self.rank] for name, tensor in tensors.items()}

    def own_columns(self, tensor: Tensor) -> Tensor:
        """The columns of this rank's environments, from a tensor [..., all environments]."""
        return tensor.tensor_split(self.size, dim=-1)[self.rank]

    def own_samples(self, samples: Tensor, num_envs: int) -> Tensor:
        """This rank's part of `samples`, as indices into its own flattened [steps, num_envs].

        Args:
            samples: [n] int64, indices into the flattened [steps, all environments].
            num_envs: environments of each rank.
        """
        if self.size == 1:
            return samples
        steps = samples // (self.size * num_envs)
        environments = samples % (self.size * num_envs) - self.rank * num_envs
        return (steps * num_envs + environments)[(environments >= 0) & (environments < num_envs)]

    def close(self) -> None:
        """Leave the process group."""
        if self._is_connected and dist.is_initialized():
            dist.destroy_process_group()
