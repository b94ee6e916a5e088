"""PPO with a clipped objective (Schulman et al. 2017, https://arxiv.org/abs/1707.06347)."""

import math
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from exporter.heads import HeadGradientMeter
from exporter.telemetry import PPOUpdateMetrics
from trainer.distributed import Ranks
from trainer.drill import Drill
from trainer.policy import ActorCritic, load_tensors
from trainer.rollout import Rollout

_BETA1, _BETA2 = 0.9, 0.999  # Adam's
_STATISTICS = 4  # policy loss, squared value error, approx KL, clipped
_APPROX_KL = 2


@dataclass(frozen=True)
class PPOHyperparameters:
    """Hyperparameters of an update; ranges and defaults are those of `trainer.config.TrainerConfig`."""

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
    """A gradient was NaN or infinite, and the run shall stop at it.

    Attributes:
        metrics: metrics of the update, up to and including this gradient step.
    """

    def __init__(self, metrics: PPOUpdateMetrics) -> None:
        heads = [head for head, count in metrics["nonfinite_gradient_steps"].items() if count]
        where = f"head{'s' * (len(heads) > 1)} {', '.join(heads)}" if heads else "the trunk or the value head"
        super().__init__(
            f"non-finite gradient in {where} at gradient step {len(metrics['gradient_cv_per_step'])} of the update; "
            "the weights did not change"
        )
        self.metrics = metrics


class Minibatch(NamedTuple):
    """This rank's samples of one gradient step.

    Attributes:
        observations: [batch, observation_size].
        actions: [batch, heads], int64.
        old_log_probs: [heads, batch], log-probabilities when the actions were taken.
        advantages: [batch], normalized over the minibatch of all ranks.
        targets, old_outputs: [batch], returns, and the value head's outputs when the actions were taken; both
            normalized by the moments of the returns.
        size: number of samples on all ranks.
    """

    observations: Tensor
    actions: Tensor
    old_log_probs: Tensor
    advantages: Tensor
    targets: Tensor
    old_outputs: Tensor
    size: int


class _Samples(NamedTuple):
    """A flattened rollout.

    Attributes:
        valid: indices of the samples to learn from, counted over all ranks; on the generator's device.
        all_advantages: advantages of the samples of all ranks.
        observations, actions: [samples of this rank, ...].
        scalars: [heads + 3, samples of this rank]: log-probabilities, then advantage, target, old output.
        explained_variance: of the returns by the values, over all ranks.
    """

    valid: Tensor
    all_advantages: Tensor
    observations: Tensor
    actions: Tensor
    scalars: Tensor
    explained_variance: Tensor


class _Epoch(NamedTuple):
    """Results of one pass over the rollout: a list entry for each minibatch.

    Attributes:
        statistics: [_STATISTICS], this rank's part of the minibatch's means.
        log_ratios: [heads, batch], log-probabilities of this rank's actions now, minus those when they were taken.
        entropies: [heads, batch].
        sizes: number of samples on all ranks.
    """

    statistics: list[Tensor]
    log_ratios: list[Tensor]
    entropies: list[Tensor]
    sizes: list[int]


class PPOAgent:
    """Improves a policy from rollouts and measures the gradient of every head.

    Args:
        policy: network to train, on its device.
        hyperparameters: see `PPOHyperparameters`.
        generator: shuffles the minibatches; on the policy's device or on the CPU. Use the CPU with several ranks, so
            that finding a rank's own samples does not wait for the device.
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
        self._meter = HeadGradientMeter(policy.head_rows, flat=policy.flat)
        self._moments = torch.zeros_like(policy.flat), torch.zeros_like(policy.flat)
        self._adam_steps = torch.zeros((), device=policy.device)

    def state_dict(self) -> dict[str, Any]:
        """Weights, moments, optimizer, the number of updates and the shuffling generator; tensors are not copied."""
        return {
            "policy": self.policy.state_dict(),
            "optimizer": self._optimizer_state(),
            "updates": self.updates,
            "generator": self._generator.get_state(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from `state_dict()` of an agent with the same network; this agent keeps its hyperparameters.

        Raises:
            KeyError, RuntimeError, TypeError, ValueError: the state does not fit the network.
        """
        self.policy.load_state_dict(state["policy"])
        load_tensors(self._optimizer_state(), state["optimizer"])
        self._generator.set_state(state["generator"])
        self.updates = state["updates"]

    def _optimizer_state(self) -> dict[str, Tensor]:
        return {"step": self._adam_steps, "exp_avg": self._moments[0], "exp_avg_sq": self._moments[1]}

    def update(
        self, rollout: Rollout, *, learning_rate: float, should_stop: Callable[[], bool] = lambda: False
    ) -> PPOUpdateMetrics:
        """One PPO update: `epochs` passes over the rollout in shuffled minibatches.

        A gradient step with a non-finite gradient is counted, but changes neither weights nor optimizer. If
        `should_stop()` is true after a gradient step, the update ends and its metrics cover the steps so far.

        Raises:
            NonFiniteGradientError: a gradient was not finite and `on_nonfinite` is `raise`.
        """
        started = time.perf_counter()
        hp = self._hyperparameters
        self.updates += 1
        samples = self._samples(rollout)
        epochs: list[_Epoch] = []
        summary = partial(self._summary, samples, epochs, self.policy.policy_layer.clone(), learning_rate, started)
        for _ in range(hp.epochs):
            epochs.append(epoch := _Epoch([], [], [], []))
            for minibatch in self._minibatches(samples, rollout.num_envs):
                for seen, so_far in zip(self._loss_gradient(minibatch), epoch, strict=True):
                    so_far.append(seen)
                global_norm = self._step(learning_rate)
                if should_stop():
                    return summary()
                if hp.on_nonfinite == "raise" and not math.isfinite(global_norm.item()):
                    raise NonFiniteGradientError(summary())
            if hp.target_kl is not None:
                if self._ranks.sum_(epoch.statistics[-1][_APPROX_KL].clone()).item() > hp.target_kl:
                    break
        return summary()

    def _samples(self, rollout: Rollout) -> _Samples:
        """The flattened rollout, with returns and values normalized for the value head.

        The value head learns returns normalized by their moments, so it works with any scale of rewards. Old values are
        normalized with the moments with which they were computed, before the update of the moments. So value clipping
        limits only what the network learns.
        """
        gather = self._ranks.gather
        valid = gather(rollout.valid).flatten().nonzero()[:, 0]
        there = valid.to(self.policy.device, non_blocking=True)
        returns, values = (gather(part).flatten()[there] for part in (rollout.returns, rollout.values))
        moments = self.policy.return_moments
        old_outputs = (rollout.values - moments.mean) / moments.std
        if self._hyperparameters.normalize_returns:
            moments.update(returns)
        targets = (rollout.returns - moments.mean) / moments.std
        return _Samples(
            valid.to(self._generator.device, non_blocking=True),
            gather(rollout.advantages).flatten(),
            rollout.observations.flatten(0, 1),
            rollout.actions.flatten(0, 1),
            torch.cat(
                [rollout.log_probs.movedim(2, 0), torch.stack([rollout.advantages, targets, old_outputs])]
            ).flatten(1),
            explained_variance(values, returns),
        )

    def _minibatches(self, samples: _Samples, num_envs: int) -> Iterator[Minibatch]:
        """One epoch: all samples, shuffled, in minibatches of nearly equal size.

        Every rank shuffles all samples in the same way, and works on those of its own environments.
        """
        count, generator = len(samples.valid), self._generator
        shuffled = samples.valid[torch.randperm(count, generator=generator, device=generator.device)]
        parts = shuffled.tensor_split(max(1, round(count / self._hyperparameters.minibatch_size)))
        own_parts = [self._ranks.own_samples(part, num_envs) for part in parts]
        sizes = [len(part) for part in own_parts]
        shuffled, own = (
            numbers.to(self.policy.device, non_blocking=True) for numbers in (shuffled, torch.cat(own_parts))
        )
        for part, of_all_ranks, observations, actions, scalars in zip(
            parts,
            samples.all_advantages.index_select(0, shuffled).split([len(part) for part in parts]),
            samples.observations.index_select(0, own).split(sizes),
            samples.actions.index_select(0, own).split(sizes),
            samples.scalars.index_select(1, own).split(sizes, dim=1),
        ):
            # Make the standard deviation of a single sample 0, not NaN.
            std, mean = torch.std_mean(of_all_ranks, correction=min(1, len(part) - 1))
            old_log_probs, scalars = scalars.split([len(scalars) - 3, 3])
            advantages, targets, old_outputs = scalars.unbind()
            advantages = (advantages - mean) / (std + 1e-8)
            yield Minibatch(observations, actions, old_log_probs, advantages, targets, old_outputs, len(part))

    def _loss_gradient(self, minibatch: Minibatch) -> tuple[Tensor, Tensor, Tensor, int]:
        """Write the gradient of the loss on the minibatch, summed over ranks, into the policy's parameters.

        loss = -E[min(ratio * A, clip(ratio) * A)] + value_coef * 0.5 * E[squared error] - entropy_coef * E[entropy]

        Returns:
            A minibatch's entries for `_Epoch`. The statistics are the policy loss, the squared value error, the
            approximate KL divergence and the clip fraction.
        """
        hp, policy = self._hyperparameters, self.policy
        observations, actions, old_log_probs, advantages, targets, old_outputs, size = minibatch
        seen = policy.forward(observations)
        distribution = policy.distribution(seen.logits)
        statistics = torch.empty(_STATISTICS, len(observations), device=policy.device)

        log_ratios = distribution.log_probs(actions).sub_(old_log_probs)
        log_ratio = log_ratios.sum(0)
        ratio = log_ratio.exp()
        surrogate = ratio * advantages
        clipped_surrogate = ratio.clamp(1 - hp.clip_range, 1 + hp.clip_range) * advantages
        torch.minimum(surrogate, clipped_surrogate, out=statistics[0]).neg_()
        # If the clipped surrogate is smaller, the ratio is out of range and has no gradient. A NaN is never smaller.
        by_log_prob = torch.where(clipped_surrogate < surrogate, 0.0, surrogate).mul_(-1 / size)

        error = seen.outputs - targets
        by_output, squared_error = error, error * error
        if hp.value_clip_range is not None:
            change = seen.outputs - old_outputs
            clipped_change = change.clamp(-hp.value_clip_range, hp.value_clip_range)
            clipped_error = clipped_change + old_outputs - targets
            squared_clipped_error = clipped_error * clipped_error
            # The gradient is zero only outside the range. Inside, rounding may also make the clipped error larger.
            is_flat = (clipped_change != change) & (squared_clipped_error > squared_error)
            by_output = torch.where(is_flat, 0.0, error)
            squared_error = torch.maximum(squared_error, squared_clipped_error)
        statistics[1] = squared_error

        by_logits = distribution.gradient(actions, by_log_prob, -hp.entropy_coef / size)
        policy.backward(seen, by_logits, by_output * (hp.value_coef / size))
        if self._drill is not None:
            self._drill.bend(policy, self.updates)
        self._ranks.sum_(policy.flat.grad)

        # Schulman's low-variance estimator, http://joschu.net/blog/kl-approx.html
        ratio -= 1
        torch.sub(ratio, log_ratio, out=statistics[_APPROX_KL])
        torch.gt(ratio.abs_(), hp.clip_range, out=statistics[3])
        return statistics.sum(1).div_(size), log_ratios, distribution.entropies, size

    def _step(self, learning_rate: float) -> Tensor:
        """Measure the gradient, clip it by its global norm, and take an Adam step; skip it if it is not finite.

        Fused Adam divides the gradient by `grad_scale` and does nothing if `found_inf` is 1. So clipping and skipping
        need neither another pass nor a wait for the device. Call it directly: on a small network
        `torch.optim.Adam.step()` takes twice as long.

        Returns:
            Global L2 norm before clipping, a 0-dimensional tensor.
        """
        hp, flat = self._hyperparameters, self.policy.flat
        global_norm = self._meter.measure()
        is_finite = torch.isfinite(global_norm).float()
        self._adam_steps.add_(is_finite)
        torch._fused_adam_(
            [flat],
            [flat.grad],
            *([moment] for moment in self._moments),
            max_exp_avg_sqs=[],
            state_steps=[self._adam_steps],
            lr=learning_rate,
            beta1=_BETA1,
            beta2=_BETA2,
            weight_decay=0.0,
            eps=hp.adam_eps,
            amsgrad=False,
            maximize=False,
            grad_scale=(global_norm / hp.max_grad_norm).clamp_(min=1.0),
            found_inf=1.0 - is_finite,
        )
        return global_norm

    def _summary(
        self, samples: _Samples, epochs: list[_Epoch], policy_layer: Tensor, learning_rate: float, started: float
    ) -> PPOUpdateMetrics:
        """The update's metrics. This is the only wait for the device.

        Args:
            samples: samples of the update.
            epochs: epochs so far.
            policy_layer: a copy from before the update.
            learning_rate: learning rate of the update.
            started: `time.perf_counter()` at the start.
        """
        steps, policy = self._meter.start_collecting(), self.policy
        of_steps = torch.stack([statistics for epoch in epochs for statistics in epoch.statistics])
        means = of_steps.mean(0)
        # The policy changes during the update: the last epoch shows how far.
        means[_APPROX_KL] = of_steps[-len(epochs[-1].sizes) :, _APPROX_KL].mean()
        means = self._ranks.sum_(torch.cat([means, *self._of_heads(epochs)]))
        change, weights = policy.head_norms(torch.stack([policy.policy_layer - policy_layer, policy_layer]))
        # Zero weights that did not change give 0, not NaN.
        update_ratios = change.div_(weights.clamp_(min=1e-12))
        numbers = torch.cat([samples.explained_variance.reshape(1), means, update_ratios]).cpu()
        explained, policy_loss, squared_error, approx_kl, clip_fraction = numbers[: 1 + _STATISTICS].tolist()
        entropies, kls, clip_fractions, update_ratios = numbers[1 + _STATISTICS :].view(4, -1).tolist()
        return PPOUpdateMetrics(
            **steps.summary(),
            # With one choice there is nothing to divide by. Rounding must not give more than 1.
            head_entropy_ratios={
                head: min(entropy / math.log(choices), 1.0)
                for (head, choices), entropy in zip(policy.heads.items(), entropies)
                if choices > 1
            },
            head_approx_kls=dict(zip(policy.heads, kls)),
            head_clip_fractions=dict(zip(policy.heads, clip_fractions)),
            head_update_ratios=dict(zip(policy.heads, update_ratios)),
            skipped_gradient_steps=steps.nonfinite_steps,
            policy_loss=policy_loss,
            value_loss=0.5 * squared_error,
            entropy=sum(entropies),
            approx_kl=approx_kl,
            clip_fraction=clip_fraction,
            explained_variance=explained,
            learning_rate=learning_rate,
            update_duration_seconds=time.perf_counter() - started,
        )

    def _of_heads(self, epochs: list[_Epoch]) -> list[Tensor]:
        """This rank's part of each head's mean entropy, KL divergence in the last epoch, and clip fraction: [heads]."""
        entropies = torch.cat([part for epoch in epochs for part in epoch.entropies], dim=1)
        log_ratios = torch.cat([part for epoch in epochs for part in epoch.log_ratios], dim=1)
        size, last_size = sum(sum(epoch.sizes) for epoch in epochs), sum(epochs[-1].sizes)
        changes = log_ratios.exp().sub_(1)  # expm1() takes six times as long
        last = slice(log_ratios.shape[1] - sum(part.shape[1] for part in epochs[-1].log_ratios), None)
        kls = (changes[:, last] - log_ratios[:, last]).sum(1)
        # In place: a float stays a float, of which a sum takes a tenth of the time.
        clipped = changes.abs_().gt_(self._hyperparameters.clip_range).sum(1)
        return [entropies.sum(1).div_(size), kls.div_(last_size), clipped.div_(size)]


def explained_variance(values: Tensor, returns: Tensor) -> Tensor:
    """1 - Var(returns - values) / Var(returns): 1 is perfect, 0 is no better than a constant.

    NaN if the returns do not vary.
    """
    variance = returns.var(correction=0)
    return torch.where(variance > 0, 1 - (returns - values).var(correction=0) / variance, math.nan)
