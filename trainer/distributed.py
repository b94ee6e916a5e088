"""The processes that train one run together, as torchrun starts them."""

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
    """This process among those that train together; alone, every method is the identity.

    Each rank steps as many environments as every other; together they are in the order of the ranks.

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
        """The ranks that torchrun started, connected; this process alone where it did not.

        gloo carries what lies on CPUs and NCCL what lies on GPUs. A rank that waits for another one for
        longer than the timeout fails. On Linux a rank gets SIGTERM when torchrun dies.
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
        """Whether this is the rank that serves, shows and writes."""
        return self.rank == 0

    def device(self, name: str) -> str:
        """The torch device for this rank: of several GPUs, `cuda` is the one with its number on this machine."""
        return f"cuda:{os.environ['LOCAL_RANK']}" if name == "cuda" and self.size > 1 else name

    def any(self, flag: bool) -> bool:
        """Whether `flag` holds on any rank."""
        return any(self.gather_objects(flag))

    def is_lost_rank(self, error: RuntimeError) -> bool:
        """Whether `error` came from waiting for another rank."""
        return self.size > 1 and (isinstance(error, dist.DistError) or "gloo" in str(error))

    def sum_(self, tensor: Tensor) -> Tensor:
        """`tensor`, in place the sum of those of all ranks: the same bits on each."""
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
        """Tensors [environments, ...] of all ranks by name, one below the other."""
        if self.size == 1:
            return dict(tensors)
        # Through the CPU: a tensor that comes from another GPU would stay there.
        of_ranks = self.gather_objects({name: tensor.cpu() for name, tensor in tensors.items()})
        return {name: torch.cat([of_rank[name] for of_rank in of_ranks]) for name in tensors}

    def own_rows(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Of tensors [all environments, ...] by name the rows of this rank's environments."""
        return {name: tensor.tensor_split(self.size)[self.rank] for name, tensor in tensors.items()}

    def own_columns(self, tensor: Tensor) -> Tensor:
        """Of a tensor [..., all environments] the columns of this rank's environments."""
        return tensor.tensor_split(self.size, dim=-1)[self.rank]

    def own_samples(self, samples: Tensor, num_envs: int) -> Tensor:
        """Those of `samples` that are this rank's, counted in its own flattened [steps, num_envs].

        Args:
            samples: [n] int64, counted in the flattened [steps, all environments].
            num_envs: environments of each rank.
        """
        if self.size == 1:
            return samples
        steps = samples // (self.size * num_envs)
        environments = samples % (self.size * num_envs) - self.rank * num_envs
        return (steps * num_envs + environments)[(environments >= 0) & (environments < num_envs)]

    def close(self) -> None:
        """Part from the others."""
        if self._is_connected and dist.is_initialized():
            dist.destroy_process_group()
