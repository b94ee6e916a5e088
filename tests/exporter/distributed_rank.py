"""One rank of test_distributed.py: DistributedDataParallel over gloo, each rank with its own data."""

import json
import os
import socket
import sys
import time
import urllib.request
from pathlib import Path

import torch
import torch.distributed as dist
from prometheus_client.parser import text_string_to_metric_families
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor
from torch.nn.parallel import DistributedDataParallel

from exporter import GradientMonitor, RunAggregator, gradient_cv

torch.set_num_threads(1)
dist.init_process_group("gloo")
rank = dist.get_rank()
mesh = init_device_mesh("cpu", (2,))


def two_free_ports() -> int:
    """A port that is free together with the next one; rank 0 chooses for both."""
    chosen = [0]
    while rank == 0 and not chosen[0]:
        try:
            with socket.create_server(("127.0.0.1", 0)) as one:
                port = one.getsockname()[1]
                socket.create_server(("127.0.0.1", port + 1)).close()
            chosen = [port]
        except OSError:
            pass
    dist.broadcast_object_list(chosen)
    return chosen[0]


class Sum(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.heads = nn.ModuleDict({"a": nn.Linear(4, 2), "b": nn.Linear(4, 3), "c": nn.Linear(4, 5)})

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return sum((index + 1) ** 2 * head(x).square().mean() for index, head in enumerate(self.heads.values()))


def train_by_hand(run: str, is_ready: bool = False, **options) -> None:
    """A step whose gradients are averaged after the backward pass, and clipped."""
    torch.manual_seed(0)
    model = Sum()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    heads = dict(model.heads.items())
    monitor = GradientMonitor(heads, run, window_steps=1, aggregator=aggregator, **options).attach(optimizer)
    model(batches[rank]).backward()
    for parameter in model.parameters():
        dist.all_reduce(parameter.grad)
        parameter.grad /= 2
    if is_ready:
        monitor.gradients_ready()
    nn.utils.clip_grad_norm_(model.parameters(), 1e-3)
    optimizer.step()


torch.manual_seed(0)
plain = Sum()
parallel = DistributedDataParallel(plain)
optimizer = torch.optim.SGD(parallel.parameters(), lr=0.1)
aggregator = RunAggregator()
monitor = GradientMonitor(dict(plain.heads.items()), "pair", window_steps=1, aggregator=aggregator).attach(optimizer)
early = GradientMonitor(
    dict(plain.heads.items()), "early", window_steps=1, before_clipping=True, aggregator=aggregator
).attach(optimizer)
url = monitor.serve(two_free_ports())
url_of_rank = monitor.serve(two_free_ports(), every_rank=True)

batches = [torch.randn(8, 4, generator=torch.Generator().manual_seed(seed)) for seed in (1, 2)]
parallel(batches[rank]).backward()
nn.utils.clip_grad_norm_(parallel.parameters(), 1e-3)
optimizer.step()
early.detach()
train_by_hand("unready", before_clipping=True)
train_by_hand("ready", is_ready=True)

torch.manual_seed(0)
reference = Sum()
(sum(reference(batch) for batch in batches) / 2).backward()
norms = [torch.cat([p.grad.flatten() for p in head.parameters()]).norm().item() for head in reference.heads.values()]


def labels_at(url: str) -> dict[str, str]:
    """Labels of the CV there, once it is that of the update."""
    while True:
        text = urllib.request.urlopen(url, timeout=10).read().decode()
        families = {family.name: family.samples for family in text_string_to_metric_families(text)}
        if families["ppo_updates"][0].value == 1.0:
            return families["ppo_gradient_cv"][0].labels
        time.sleep(0.05)


try:
    sharded = nn.Parameter(distribute_tensor(torch.randn(4, 4), mesh, [Shard(0)]))
    GradientMonitor({"x": [sharded]}, "sharded", aggregator=aggregator).attach(torch.optim.SGD([sharded], lr=0.1))
    refusal = "attached"
except ValueError as error:
    refusal = str(error)

Path(sys.argv[1]).write_text(
    json.dumps(
        {
            "cv": aggregator.snapshot.runs["pair"].gradient_quality.gradient_cv,
            "expected_cv": gradient_cv(norms),
            "norms_before_clipping": list(aggregator.snapshot.runs["early"].gradient_quality.head_norms.values()),
            "norms_when_ready": list(aggregator.snapshot.runs["ready"].gradient_quality.head_norms.values()),
            "expected_norms": norms,
            "labels": labels_at(url) if url else None,
            "labels_of_rank": labels_at(url_of_rank),
            "port_of_rank": int(url_of_rank.split(":")[2].split("/")[0]),
            "sharded": refusal,
        }
    )
)
monitor.close()
dist.barrier()
sys.stdout.flush()
# Without the interpreter's own end, in which gloo's threads now and then abort the process.
os._exit(0)
