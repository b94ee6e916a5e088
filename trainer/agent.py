"""PPO with a clipped objective (Schulman et al. 2017, https://arxiv.org/abs/1707.06347)."""

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from exporter.heads import HeadGradientMeter
from exporter.telemetry import GradientStep, PPOUpdateMetrics, summarize_gradient_steps
from trainer.distributed import Ranks
from trainer.drill import Drill
from trainer.policy import ActorCritic, flat_parameters
from trainer.rollout import Rollout


@dataclass(frozen=True)
class PPOHyperparameters:
    """What an update needs to know; ranges and defaults are those of `trainer.config.TrainerConfig`."""

    minibatch_size: int
    epochs: int
    clip_range: float
    value_clip_range: float | None
    entropy_coef: float
    value_coef: float
    max_grad_norm: float
    target_kl: float | None
    adam_eps: float
    on_nonfinite: str
    normalize_returns: bool = True


class NonFiniteGradientError(FloatingPointError):
    """A gradient was NaN or infinite and the run is to stop at it.

    Attributes:
        metrics: of the update up to and including the bad gradient step.
    """

    def __init__(self, step: GradientStep, number: int, metrics: PPOUpdateMetrics) -> None:
        heads = [head for head, norm in step.head_norms.items() if not math.isfinite(norm)]
        where = f"head{'s' * (len(heads) > 1)} {', '.join(heads)}" if heads else "the trunk or the value head"
        super().__init__(
            f"non-finite gradient in {where} at gradient step {number} of the update; weights are untouched"
        )
        self.metrics = metrics


class PPOAgent:
    """Improves a policy from rollouts and measures the gradient of every head while it does.

    Args:
        policy: network to train, already on its device.
        hyperparameters: see `PPOHyperparameters`.
        generator: CPU generator that shuffles the minibatches.
        drill: a fault to inject, for testing alerts.
        ranks: the processes that train this policy together.
    """

    def __init__(
        self,
        policy: ActorCritic,
        hyperparameters: PPOHyperparameters,
        generator: torch.Generator,
        drill: Drill | None = None,
        ranks: Ranks = Ranks(),
    ) -> None:
        self.policy = policy
        self.updates = 0
        self._hyperparameters = hyperparameters
        self._generator = generator
        self._drill = drill
        self._ranks = ranks
        self._parameters = flat_parameters(policy)
        self._optimizer = torch.optim.Adam([self._parameters], eps=hyperparameters.adam_eps, fused=True)
        self._meter = HeadGradientMeter(policy.head_rows, policy.parameters())

    def state_dict(self) -> dict[str, Any]:
        """Weights, moments, optimizer, the number of updates and the shuffling generator; tensors are not copied."""
        return {
            "policy": self.policy.state_dict(),
            "optimizer": self._optimizer.state_dict()["state"],
            "updates": self.updates,
            "generator": self._generator.get_state(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from `state_dict()` of an agent with the same network; hyperparameters stay this agent's own.

        Raises:
            KeyError, RuntimeError, TypeError, ValueError: the state is that of another network, or none.
        """
        self.policy.load_state_dict(state["policy"])
        groups = self._optimizer.state_dict()["param_groups"]
        self._optimizer.load_state_dict({"state": state["optimizer"], "param_groups": groups})
        self._generator.set_state(state["generator"])
        self.updates = state["updates"]

    def update(
        self, rollout: Rollout, *, learning_rate: float, should_stop: Callable[[], bool] = lambda: False
    ) -> PPOUpdateMetrics:
        """One PPO update: `epochs` passes over the rollout in shuffled minibatches.

        A gradient step whose gradient is not finite leaves weights and optimizer
        as they are, and is counted. If `should_stop()` holds after a gradient
        step, the update ends there and its metrics cover the steps done.

        Raises:
            NonFiniteGradientError: a gradient was not finite and `on_nonfinite` is `raise`.
        """
        started = time.perf_counter()
        hp, ranks = self._hyperparameters, self._ranks
        device = self._parameters.device
        self.updates += 1
        self._optimizer.param_groups[0]["lr"] = learning_rate

        # Every rank knows all advantages and shuffles all samples alike; it works on those of its own environments.
        all_advantages, all_returns, all_values, trained_on = (
            ranks.gather(array).reshape(-1)
            for array in (rollout.advantages, rollout.returns, rollout.values, rollout.trained_on)
        )
        samples = torch.from_numpy(np.flatnonzero(trained_on))
        all_advantages, observations, actions, old_values = (
            torch.from_numpy(array).to(device, non_blocking=True)
            for array in (all_advantages, rollout.observations, rollout.actions, rollout.values)
        )
        observations, actions = observations.flatten(0, 1), actions.flatten(0, 1)
        # Value errors count in standard deviations of the returns, whatever the environment pays. New moments
        # move what the value head's output stands for; the old values move along, so that only learning is clipped.
        moments = self.policy.return_moments
        old_outputs = (old_values - moments.mean) / moments.deviation
        if hp.normalize_returns:
            moments.include(all_returns[trained_on])
        scale = moments.deviation
        log_probs, advantages, returns = torch.from_numpy(
            np.stack([rollout.log_probs, rollout.advantages, rollout.returns])
        ).to(device, non_blocking=True)
        experience = torch.stack([log_probs, advantages, returns, moments.mean + scale * old_outputs], dim=-1).flatten(
            0, 1
        )
        minibatches = max(1, round(len(samples) / hp.minibatch_size))
        statistics: list[Tensor] = []
        stopped = raised = False

        for _ in range(hp.epochs):
            shuffled = samples[torch.randperm(len(samples), generator=self._generator)]
            for batch in shuffled.tensor_split(minibatches):
                own = ranks.own_samples(batch, rollout.num_envs).to(device, non_blocking=True)
                old_log_probs, advantage, returns, old_values = experience.index_select(0, own).unbind(1)
                # Of a single sample the deviation is 0, not NaN.
                of_all_ranks = all_advantages.index_select(0, batch.to(device, non_blocking=True))
                deviation, mean = torch.std_mean(of_all_ranks, correction=min(1, len(batch) - 1))
                advantage = (advantage - mean) / (deviation + 1e-8)

                distribution, values = self.policy(observations.index_select(0, own))
                log_probs, entropies = distribution.evaluate(actions.index_select(0, own))
                # Each mean runs over the samples of all ranks, whose gradients are added up.
                entropy = entropies.sum() / len(batch)

                log_ratio = log_probs - old_log_probs
                ratio = log_ratio.exp()
                clipped_ratio = ratio.clamp(1 - hp.clip_range, 1 + hp.clip_range)
                policy_loss = -torch.min(ratio * advantage, clipped_ratio * advantage).sum() / len(batch)

                squared_error = ((values - returns) / scale) ** 2
                if hp.value_clip_range is not None:
                    limit = hp.value_clip_range * scale
                    clipped_values = old_values + (values - old_values).clamp(-limit, limit)
                    squared_error = torch.max(squared_error, ((clipped_values - returns) / scale) ** 2)
                value_loss = 0.5 * squared_error.sum() / len(batch)

                loss = policy_loss + hp.value_coef * value_loss - hp.entropy_coef * entropy
                self._parameters.grad.zero_()
                loss.backward()
                if self._drill is not None:
                    self._drill.bend(self.policy, self.updates)
                ranks.sum_(self._parameters.grad)

                # The one pass over the gradients: head norms for the metric, global norm for clipping.
                global_norm = self._meter.measure()
                # Fused Adam divides the gradient by grad_scale and does nothing where found_inf is 1:
                # clipping and skipping without a pass of their own and without waiting for the device.
                self._optimizer.grad_scale = (global_norm / hp.max_grad_norm).clamp(min=1.0)
                self._optimizer.found_inf = (~torch.isfinite(global_norm)).float()
                self._optimizer.step()

                with torch.no_grad():
                    # Schulman's low-variance estimator, http://joschu.net/blog/kl-approx.html
                    approx_kl = (ratio - 1 - log_ratio).sum() / len(batch)
                    clip_fraction = ((ratio - 1).abs() > hp.clip_range).sum() / len(batch)
                    statistics.append(torch.stack([policy_loss, value_loss, entropy, approx_kl, clip_fraction]))
                stopped = should_stop()
                raised = hp.on_nonfinite == "raise" and not math.isfinite(global_norm.item())
                if stopped or raised:
                    break
            if stopped or raised:
                break
            if hp.target_kl is not None and ranks.sum_(statistics[-1].clone())[3].item() > hp.target_kl:
                break

        # The only wait for the device: the norms are on their way when the statistics arrive.
        norms = self._meter.start_collecting()
        policy_loss, value_loss, entropy, approx_kl, clip_fraction = ranks.sum_(
            torch.stack(statistics).mean(0)
        ).tolist()
        steps = norms.result()
        metrics = PPOUpdateMetrics(
            **summarize_gradient_steps(steps),
            skipped_gradient_steps=sum(not math.isfinite(step.global_norm) for step in steps),
            policy_loss=policy_loss,
            value_loss=value_loss,
            entropy=entropy,
            approx_kl=approx_kl,
            clip_fraction=clip_fraction,
            explained_variance=explained_variance(all_values[trained_on], all_returns[trained_on]),
            learning_rate=learning_rate,
            update_duration_seconds=time.perf_counter() - started,
        )
        if raised:
            raise NonFiniteGradientError(steps[-1], len(steps), metrics)
        return metrics


def explained_variance(values: np.ndarray, returns: np.ndarray) -> float:
    """1 - Var(returns - values) / Var(returns): 1 is perfect, 0 no better than a constant.

    NaN when the returns do not vary.
    """
    variance = returns.var()
    return float(1 - (returns - values).var() / variance) if variance > 0 else math.nan
