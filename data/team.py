"""The processes that torchrun started, which train one adapter together."""
import os
from contextlib import contextmanager
from datetime import timedelta
from typing import NamedTuple

import torch
import torch.distributed as dist


class Team(NamedTuple):
    """The processes that torchrun started, each with a share of every batch. Alone: rank 0 of 1."""
    rank: int
    size: int
    device: torch.device

    @classmethod
    def join(cls, device: torch.device) -> "Team":
        if "RANK" not in os.environ:
            return cls(0, 1, device)
        cuda = device.type == "cuda"
        if cuda:
            device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", os.environ["RANK"])))
            torch.cuda.set_device(device)
        dist.init_process_group("nccl" if cuda else "gloo", device_id=device if cuda else None,
                                timeout=timedelta(hours=6))  # the first process may have gigabytes to download
        return cls(dist.get_rank(), dist.get_world_size(), device)

    def wait(self):
        if self.size > 1:
            dist.barrier()

    def of_the_first(self, value):
        """The first process's value, in all of them."""
        values = [value]
        if self.size > 1:
            dist.broadcast_object_list(values)
        return values[0]

    def leave(self):
        if self.size > 1:
            dist.destroy_process_group()

    def has_lost_one(self, error: Exception) -> bool:
        """Whether an error is that another process has ended."""
        return self.size > 1 and ("gloo" in str(error) or isinstance(error, dist.DistError))

    @contextmanager
    def first_alone(self):
        """The first process goes through the block alone, then all others do."""
        if self.rank > 0:
            self.wait()
        yield
        if self.rank == 0:
            self.wait()

    def add_up(self, parameters, sums: torch.Tensor) -> torch.Tensor:
        """Sums gradients, in place, and `sums` (k,) over all processes: each has divided its loss by the token counts
        of the whole batch, so that the sum is what one process would have, also where shares differ. Adapters are
        small: one buffer and one exchange after the backward do for DistributedDataParallel's many during it."""
        if self.size == 1:
            return sums
        flat = torch.cat([*(p.grad.flatten() for p in parameters), sums])
        dist.all_reduce(flat)
        *grads, sums = flat.split([*(p.numel() for p in parameters), len(sums)])
        for p, grad in zip(parameters, grads):
            p.grad.copy_(grad.view_as(p))
        return sums

    def shard(self, model: torch.nn.Module, adapters: set[torch.nn.Parameter]):
        """Spreads the frozen base: of each block a process keeps 1 / size, and fetches the rest when the block's turn
        in forward or backward comes. Adapters and their optimizer stay whole everywhere, all else is as it was."""
        from torch.distributed.device_mesh import init_device_mesh  # a second to import, which few need
        from torch.distributed.fsdp import fully_shard
        for p in adapters:
            p.data = p.data.to(self.device)
        mesh = init_device_mesh(self.device.type, (self.size,))
        for module in (*model.blocks, model):  # one by one: no more than a block is whole on the device
            fully_shard(module, mesh=mesh, ignored_params=adapters)


if __name__ == "__main__":
    import data  # noqa: F401  (data.py, which says what to run instead)
