"""What other libraries say of the same faults, once an update.

They are no dependencies. In an environment of their own, beside this project's:

    python3.11 -m venv /tmp/peers && /tmp/peers/bin/pip install --no-deps trainpulse traintools torchdiag
    echo "$PWD/.venv/lib/python3.11/site-packages" > /tmp/peers/lib/python3.11/site-packages/ours.pth
    PYTHONPATH=. /tmp/peers/bin/python -m study.peers

trainpulse gets the loss and the global norm. traintools and torchdiag look at the gradients of every layer, each action
head's as a layer of its own, before the first gradient step of an update.
"""

import contextlib
import csv
import io
import sys
from collections import defaultdict
from pathlib import Path

from torch import Tensor, nn

from study.environments import TASKS
from study.faults import FAULTS
from study.runs import NO_FAULT, Job, train
from study.wrapping import around
from trainer.policy import ActorCritic
from trainer.training import Training

DATA = Path(__file__).parent / "data" / "peers.csv"
PEERS = ("trainpulse", "traintools", "torchdiag")
JOBS = [Job(task, NO_FAULT, seed) for task in ("contextual", "drone") for seed in (1, 2, 3)] + [
    Job(task, name, 1)
    for name, fault in FAULTS.items()
    for task in ("contextual", "drone")
    if task in (fault.tasks or TASKS)
]


class Layers(nn.Module):
    """The policy's tensors as named parameters, action heads apart, with their gradients."""

    def __init__(self, policy: ActorCritic) -> None:
        super().__init__()
        self._gradients: list[tuple[nn.Parameter, Tensor]] = []
        for name, tensor in policy.parameters.items():
            if not name.startswith("policy"):
                self._add(name, tensor, tensor.grad)
        for head, parts in policy.head_rows.items():
            for part, name in zip(parts, ("weight", "bias")):
                rows = slice(part.start, part.stop)
                self._add(f"{head}_{name}", part.parameter[rows], part.parameter.grad[rows])

    def _add(self, name: str, tensor: Tensor, gradient: Tensor) -> None:
        parameter = nn.Parameter(tensor.detach())
        self.register_parameter(name, parameter)
        self._gradients.append((parameter, gradient))

    def now(self) -> "Layers":
        for parameter, gradient in self._gradients:
            parameter.grad = gradient
        return self


def watch(job: Job) -> dict[str, list[bool]]:
    """For each peer, whether it warns at each update of the run."""
    import torchdiag
    import trainpulse
    import traintools

    said: dict[str, list[bool]] = defaultdict(list)
    health = traintools.GradientHealthMonitor()

    def attach(training: Training) -> None:
        agent, layers = training.agent, Layers(training.agent.policy)

        def step(original, learning_rate):
            if len(said["traintools"]) < agent.updates:
                said["traintools"].append(not health.inspect(layers.now(), step=agent.updates, lr=learning_rate).ok)
                with contextlib.redirect_stdout(io.StringIO()):
                    found = torchdiag.check_gradients(layers)
                said["torchdiag"].append(any(layer["status"] != "OK" for layer in found.values()))
            return original(learning_rate)

        around(agent, "_step", step)

    rows = train(job, attach)
    monitor = trainpulse.Monitor()
    for row in rows:
        alerts = monitor.log("loss", row.update, row.policy_loss + 0.5 * row.value_loss)
        alerts += monitor.log("grad_norm", row.update, row.gradient_norm)
        said["trainpulse"].append(bool(alerts))
    return said


def main() -> None:
    with DATA.open("w", newline="") as file:
        out = csv.writer(file)
        out.writerow(["task", "fault", "seed", *(f"{peer}_{what}" for peer in PEERS for what in ("first", "updates"))])
        for job in JOBS:
            said = watch(job)
            numbers = []
            for peer in PEERS:
                updates = [number for number, warns in enumerate(said[peer], 1) if warns]
                numbers += [updates[0] if updates else "", len(updates)]
            out.writerow([*job[:3], *numbers])
            file.flush()
            print(*job[:3], *numbers, file=sys.stderr)


if __name__ == "__main__":
    main()
