"""Signals and counts that a trainer records between two windows."""

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
    """Signals and counts for the next window.

    Counts add up; durations belong to one window; everything else stays until it is recorded again.
    """

    def __init__(self) -> None:
        self._signals: dict[str, float | dict[str, float]] = {}
        self._others: dict[str, float] = {}
        self._increments: Counter[str] = Counter()

    def record(self, values: Mapping[str, Any]) -> None:
        """Record values, all of them or none.

        Raises:
            TypeError: there is no signal of that name, or the value is not a number.
            ValueError: the value is out of range, such as a negative count.
        """
        signals: Mapping[str, Any] = values.get("signals") or {}
        checked = {name: _checked(name, value) for name, value in values.items() if name != "signals"}
        others = {name: None if value is None else _number(name, value, float) for name, value in signals.items()}
        PPOUpdatePayload(run="checked", signals={name: value or 0.0 for name, value in others.items()})
        self._others = {name: value for name, value in {**self._others, **others}.items() if value is not None}
        for name, value in checked.items():
            if value is None:
                self._signals.pop(name, None)
            elif name in _INCREMENTS and not isinstance(value, dict):
                self._increments[name] += int(value)
            else:
                self._signals[name] = value

    def take(self) -> dict[str, Any]:
        """The values for a window, as fields of `PPOUpdatePayload`."""
        progress = {**self._signals, **self._increments, "signals": self._others}
        self._increments = Counter()
        for name in _ONCE:
            self._signals.pop(name, None)
        return progress

    def give_back(self, progress: Mapping[str, Any]) -> None:
        """Return the counts of a window that was not published, for the next window."""
        self._increments.update({name: progress[name] for name in _INCREMENTS & progress.keys()})


def _checked(name: str, value: object) -> float | dict[str, float] | None:
    """`value` converted for the payload."""
    if name not in _RECORDABLE:
        nearest = difflib.get_close_matches(name, _RECORDABLE, n=1)
        hint = f"; did you mean {nearest[0]}?" if nearest else f"; there are {', '.join(_RECORDABLE)}"
        raise TypeError(f"no signal {name!r}{hint}")
    if value is None:
        return None
    if name in HEAD_SIGNALS:
        if not isinstance(value, Mapping):
            raise TypeError(f"{name} must be a mapping, head -> number, got {value!r}")
        plain: Any = {head: _number(f"{name}[{head!r}]", number, float) for head, number in value.items()}
    else:
        plain = _number(name, value, int if name in _INCREMENTS else float)
    payload: dict[str, Any] = {"run": "checked", name: plain}
    PPOUpdatePayload(**payload)
    return plain


def _number(name: str, value: Any, kind: Callable[[Any], float]) -> float:
    try:
        return kind(value.detach() if hasattr(value, "detach") else value)  # torch warns without detach()
    except (TypeError, ValueError, OverflowError, RuntimeError) as error:
        raise TypeError(f"{name} must be a number, got {value!r}") from error
