"""The committed dashboards, their queries as Grafana sends them, and what those read."""

import json
import re
from collections.abc import Iterator
from pathlib import Path

import promql_parser

ROOT = Path(__file__).resolve().parents[2]
RUN, FLEET = (
    json.loads((ROOT / f"grafana/dashboards/{uid}.json").read_text()) for uid in ("ppo-gradient-health", "ppo-fleet")
)
BOARDS = {board["uid"]: board for board in (RUN, FLEET)}

DEFAULT_SCRAPE_INTERVAL = 15  # seconds: of a Prometheus data source without a timeInterval


def panels(board: dict) -> list[dict]:
    """All panels, those of collapsed rows too, without the rows."""
    every = [panel for each in board["panels"] for panel in (each, *each.get("panels", []))]
    return [panel for panel in every if panel["type"] != "row"]


def panel(board: dict, title: str) -> dict:
    return next(panel for panel in panels(board) if panel["title"] == title)


def properties(of: dict) -> dict[str, dict]:
    """What a panel's overrides set, by the series or column that they match."""
    return {
        override["matcher"]["options"]: {entry["id"]: entry["value"] for entry in override["properties"]}
        for override in of["fieldConfig"]["overrides"]
    }


def variables(board: dict) -> dict[str, dict]:
    return {variable["name"]: variable for variable in board["templating"]["list"]}


def queries(board: dict) -> Iterator[tuple[str, dict]]:
    """(title, target) of panels and annotations."""
    for each in panels(board):
        yield from ((each["title"], target) for target in each["targets"])
    for annotation in board["annotations"]["list"]:
        yield annotation["name"], annotation


def rate_interval(target: dict, interval: int) -> int:
    """$__rate_interval in seconds, as Grafana's documentation defines it, at an $__interval of so many seconds."""
    scrape = int(target["interval"].removesuffix("s")) if "interval" in target else DEFAULT_SCRAPE_INTERVAL
    return max(max(interval, scrape) + scrape, 4 * scrape)


def with_values(target: dict, **values: str) -> str:
    """The target's expression as Grafana sends it: everything chosen, except for `values`; over 10 minutes.

    Raises:
        KeyError: Grafana does not know a variable of it.
    """
    known = {"job": ".+", "run": ".*", "instance": ".+", "__range": "600s"}
    known |= {"__rate_interval": f"{rate_interval(target, 2)}s"} | values
    return re.sub(r"\$(\w+)", lambda variable: known[variable[1]], target["expr"])


def walk(node, above: tuple = ()) -> Iterator[tuple]:
    """(selector, the expressions it stands in, outermost first)"""
    if isinstance(node, promql_parser.VectorSelector):
        yield node, above
    elif isinstance(node, promql_parser.MatrixSelector):
        yield node.vector_selector, (*above, node)
    else:
        children = [getattr(node, part, None) for part in ("expr", "lhs", "rhs", "param")]
        for child in (*children, *(getattr(node, "args", None) or [])):
            if child is not None:
                yield from walk(child, (*above, node))


def selectors(expression: str) -> list[tuple]:
    """All that PromQL reads: (selector, the expressions it stands in).

    Raises:
        ValueError: it is no PromQL.
    """
    return list(walk(promql_parser.parse(expression)))
