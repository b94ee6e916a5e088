"""This project's trainer, as `python -m trainer` runs it: gradients measured, /metrics served."""

from dataclasses import asdict

import torch

from benchmarks.peers import Contestant, Setting
from exporter.link import MetricsServer
from trainer.config import TrainerConfig
from trainer.stop import StopRequest
from trainer.training import Training


def start(setting: Setting) -> Contestant:
    config = TrainerConfig(
        **asdict(setting),
        threads=torch.get_num_threads(),
        separate_critic=True,
        normalize_returns=False,
        anneal_learning_rate=False,
    )
    training, never = Training(config), StopRequest()
    server = MetricsServer(training.aggregator, port=0)
    return Contestant(lambda: training.update(never), server.url)
