"""Trainings of Stable-Baselines3 that tests watch."""

from conftest import fetch, wait_until
from gymnasium import spaces
from levers import Levers
from prometheus_client.parser import text_string_to_metric_families
from stable_baselines3 import PPO
from stable_baselines3.common.callbacks import BaseCallback

NVEC = (3, 4, 2)


def ppo(action_space: spaces.Space | None = None, **options) -> PPO:
    env = Levers(spaces.MultiDiscrete(NVEC) if action_space is None else action_space)
    options = {"n_steps": 32, "batch_size": 16, "n_epochs": 2, "seed": 1, **options}
    return PPO("MlpPolicy", env, device="cpu", **options)


class AfterEachUpdate(BaseCallback):
    """Calls back when the next rollout begins; stands behind the callback under test."""

    def __init__(self, action) -> None:
        super().__init__()
        self.action = action

    def _on_step(self) -> bool:
        return True

    def _on_rollout_start(self) -> None:
        if self.num_timesteps:
            self.action()


def scrape(url: str, updates: int) -> dict[str, float]:
    """Values by name, and by name and head or health where there is one, of the run once it has so many updates."""

    def look() -> dict[str, float] | None:
        values = {}
        for family in text_string_to_metric_families(fetch(url)[1]):
            for sample in family.samples:
                label = sample.labels.get("head") or sample.labels.get("health")
                name = f"{sample.name}/{label}" if label and sample.name != "ppo_gradient_cv" else sample.name
                values[name] = sample.value
        return values if values["ppo_updates_total"] == updates else None

    return wait_until(look, f"{updates} updates are served")
