"""What a trainer says of itself between two windows."""

import difflib
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import fields
from typing import Any

from exporter.telemetry import HEAD_SIGNALS, GradientMetrics, PPOUpdatePayload

_MEASURED = set(GradientMetrics.__annotations__) | {"run", "skipped_gradient_steps", "timestamp_seconds"}
_RECORDABLE = [f.name for f in fields(PPOUpdatePayload) if f.name not in _MEASURED]
_INCREMENTS = {"environment_steps", "episodes"}
_ONCE = {"update_duration_seconds", "rollout_duration_seconds"}


class Progress:
    """Signals and counts that wait for the next window. Counts add up; durations belong to one window; everything
    else stays until it is recorded anew."""

    def __init__(self) -> None:
        self._signals: dict[str, float] = {}
        self._others: dict[str, float] = {}
        self._increments: Counter[str] = Counter()

    def record(self, values: Mapping[str, Any]) -> None:
        """Take values over, all of them or none.

        Raises:
            TypeError: there is no signal of that name, or the value is no number.
            ValueError: the value is out of its range, a negative count say.
        """
        signals: Mapping[str, Any] = values.get("signals") or {}
        checked = {name: _checked(name, value) for name, value in values.items() if name != "signals"}
        others = {name: None if value is None else _number(name, value, float) for name, value in signals.items()}
        PPOUpdatePayload(run="checked", signals={name: value or 0.0 for name, value in others.items()})
        self._others = {name: value for name, value in {**self._others, **others}.items() if value is not None}
        for name, value in checked.items():
            if name in _INCREMENTS:
                self._increments[name] += int(value or 0)
            elif value is None:
                self._signals.pop(name, None)
            else:
                self._signals[name] = value

    def take(self) -> dict[str, Any]:
        """What a window has to say: fields of `PPOUpdatePayload`."""
        progress = {**self._signals, **self._increments, "signals": self._others}
        self._increments = Counter()
        for name in _ONCE:
            self._signals.pop(name, None)
        return progress

    def give_back(self, progress: Mapping[str, Any]) -> None:
        """Nothing came of the window: what was counted in it goes to the next one."""
        self._increments.update({name: progress[name] for name in _INCREMENTS & progress.keys()})


def _checked(name: str, value: object) -> float | dict[str, float] | None:
    """`value` as the payload takes it."""
    if name not in _RECORDABLE:
        nearest = difflib.get_close_matches(name, _RECORDABLE, n=1)
        hint = f"; did you mean {nearest[0]}?" if nearest else f"; there are {', '.join(_RECORDABLE)}"
        raise TypeError(f"no signal {name!r}{hint}")
    if value is None:
        return None
    plain: float | dict[str, float]
    if name in HEAD_SIGNALS:
        if not isinstance(value, Mapping):
            raise TypeError(f"{name} must be a mapping, head -> number, got {value!r}")
        plain = {head: _number(f"{name}[{head!r}]", number, float) for head, number in value.items()}
    else:
        plain = _number(name, value, int if name in _INCREMENTS else float)
    payload: dict[str, Any] = {"run": "checked", name: plain}
    PPOUpdatePayload(**payload)
    return plain


def _number(name: str, value: Any, kind: Callable[[Any], float]) -> float:
    try:
        return kind(value.detach() if hasattr(value, "detach") else value)  # of a loss torch would warn
    except (TypeError, ValueError, OverflowError, RuntimeError) as error:
        raise TypeError(f"{name} must be a number, got {value!r}") from error
