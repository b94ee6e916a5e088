"""This project's trainer, as `python -m trainer` runs it: gradients measured, /metrics served, checkpoints written."""

from contextlib import ExitStack
from dataclasses import asdict
from tempfile import TemporaryDirectory

import torch

from benchmarks.peers import Contestant, Setting
from exporter.link import MetricsServer
from trainer.checkpoint import Checkpoints
from trainer.config import TrainerConfig
from trainer.stop import StopRequest
from trainer.training import Training


def start(setting: Setting) -> Contestant:
    stack = ExitStack()
    config = TrainerConfig(
        **asdict(setting),
        threads=torch.get_num_threads(),
        separate_critic=True,
        normalize_returns=False,
        anneal_learning_rate=False,
        checkpoint_dir=stack.enter_context(TemporaryDirectory(prefix="ppo-throughput-")),
    )
    training, never = Training(config), StopRequest()
    server = stack.enter_context(MetricsServer(training.aggregator, port=0))
    checkpoints = stack.enter_context(Checkpoints(training))

    def update() -> None:
        training.update(never)
        checkpoints.updated()

    return Contestant(update, server.url, stack.close)
