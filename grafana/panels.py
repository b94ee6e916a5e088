"""What both dashboards share: variables, queries, colors, panels with our defaults, and the grid.

Everything is a dict of Grafana's JSON model.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from exporter.health import HealthLevel

RUN_DASHBOARD_UID = "ppo-gradient-health"
FLEET_DASHBOARD_UID = "ppo-fleet"

DATASOURCE = {"type": "prometheus", "uid": "${datasource}"}
MIN_STEP = "30s"
"""Minimum step of queries with rates. $__rate_interval is at least four times that: enough for a scrape a minute."""

# Green, yellow and red are levels.
GREEN, YELLOW, RED = (level.color for level in HealthLevel)
NEUTRAL = "text"  # Grafana's name for the color of text
SHADES = {"mode": "shades", "fixedColor": "blue"}
BY_NAME = {"mode": "palette-classic-by-name"}
"""For lines that must be distinguished: one color per name in all panels."""
HEAD_COLORS = {
    **{"slot": "#8AB8FF", "blueprint": "#1F60C4", "alpha": "#37B7C3", "target": "#B877D9"},
    **{"speed": "#FF85D0", "curve": "#7C6BE0", "op": "#C7D0D9"},
}
"""Heads of the default environment: two of them would get the same color by name."""
NO_UPDATE_YET = -1
LEVELS = {NO_UPDATE_YET: ("no update yet", "transparent")} | {
    index: (level.word, level.color) for index, level in enumerate(HealthLevel)
}
"""-1, 0, 1, 2 in words and colors for operators."""
LAST_VALUE = dict(calcs=["lastNotNull"], values=False)
LOG_SCALE = dict(scaleDistribution=dict(type="log", log=10))


def range_query(expr: str, legend: str, **more: object) -> dict:
    """The values of `expr` over the time range. The legend may contain labels: {{run}}."""
    min_step = {"interval": MIN_STEP} if "$__rate_interval" in expr else {}
    return dict(expr=expr, legendFormat=legend, range=True, instant=False, datasource=DATASOURCE) | min_step | more


def now_query(expr: str, legend: str = "", **more: object) -> dict:
    """The values of `expr` at the end of the time range."""
    return range_query(expr, legend, range=False, instant=True, **more)


def table_query(expr: str) -> dict:
    """One row per series, one column per label. Aggregate the metric's name away, or it becomes a column."""
    return now_query(expr, format="table")


def override(name: str, matcher: str = "byName", **properties: object) -> dict:
    """Properties of one series or column; `__` in a property's name stands for its dot."""
    changes = [{"id": key.replace("__", "."), "value": value} for key, value in properties.items()]
    return {"matcher": {"id": matcher, "options": name}, "properties": changes}


def fixed(color: str) -> dict:
    return {"mode": "fixed", "fixedColor": color}


def colored(colors: Mapping[str, str], matcher: str = "byName") -> list[dict]:
    """Overrides that give each series its color."""
    return [override(name, matcher, color=fixed(color)) for name, color in colors.items()]


BY_LEVEL = colored({str(level): level.color for level in HealthLevel})
"""For series named after levels."""


def thresholds(lowest: str, *steps: tuple[float, str]) -> dict:
    """Colors: `lowest` below the first step, then the color of each step."""
    return dict(mode="absolute", steps=[dict(value=value, color=color) for value, color in ((None, lowest), *steps)])


def words(meanings: Mapping[int, tuple[str, str]], null: tuple[str, str] | None = None) -> list[dict]:
    """Mappings that show numbers, and a missing value (`null`), as colored text."""
    mappings: list[dict] = [
        {"type": "value", "options": {str(number): dict(text=text, color=color)}}
        for number, (text, color) in meanings.items()
    ]
    if null:
        result = dict(text=null[0], color=null[1])
        mappings.append({"type": "special", "options": dict(match="null", result=result)})
    return mappings


def _panel(
    kind: str,
    options: dict,
    panel_id: int,
    at: tuple[int, int, int, int],
    title: str,
    description: str,
    *queries: dict,
    unit: str = "none",
    decimals: int = 0,
    overrides: Sequence[dict] = (),
    **defaults: object,
) -> dict:
    """A panel `at` (x, y below its row, width, height), in units of a grid with 24 columns.

    Never change a `panel_id`: links from alerts and runbooks use it. `defaults` are fieldConfig.defaults.
    """
    defaults = dict(unit=unit, decimals=decimals, noValue="no data") | defaults
    return dict(
        id=panel_id,
        type=kind,
        title=title,
        description=description,
        gridPos=dict(zip("xywh", at, strict=True)),
        datasource=DATASOURCE,
        targets=[dict(refId=chr(ord("A") + index)) | query for index, query in enumerate(queries)],
        options=options,
        fieldConfig=dict(defaults=defaults, overrides=list(overrides)),
    )


# Besides their own arguments, the panels take all arguments of `_panel` from `panel_id` on.


def stat(*panel: Any, filled: bool = False, text: str = "auto", **more: Any) -> dict:
    """Large numbers. `filled`: use the color as background. `text`: auto, value, value_and_name."""
    options = dict(
        colorMode="background" if filled else "value",
        textMode=text,
        graphMode="none",
        justifyMode="auto",
        orientation="auto",
        reduceOptions=LAST_VALUE,
    )
    return _panel("stat", options, *panel, **dict(thresholds=thresholds(NEUTRAL)) | more)


def lines(*panel: Any, stacked: bool = False, legend: str = "table", custom: Mapping = {}, **more: Any) -> dict:
    """Lines over time, or areas. A legend `table` has last value and maximum, a `list` only names."""
    calcs = ["lastNotNull", "max"] if legend == "table" else []
    options = dict(
        legend=dict(showLegend=True, displayMode=legend, placement="bottom", calcs=calcs),
        tooltip=dict(mode="multi", sort="desc"),
    )
    style = dict(fillOpacity=70, stacking=dict(mode="normal", group="A")) if stacked else dict(fillOpacity=0)
    return _panel("timeseries", options, *panel, **dict(color=SHADES, custom=style | custom) | more)


def head_lines(*panel: Any, **more: Any) -> dict:
    """Lines named after heads."""
    return lines(*panel, color=BY_NAME, overrides=colored(HEAD_COLORS), **more)


def bars(*panel: Any, names: str, **more: Any) -> dict:
    """Horizontal bars from zero. `names`: their place, auto or top."""
    options = dict(
        displayMode="basic",
        orientation="horizontal",
        namePlacement=names,
        valueMode="color",
        showUnfilled=True,
        legend=dict(showLegend=False, displayMode="list", placement="bottom", calcs=[]),
        reduceOptions=LAST_VALUE,
    )
    return _panel("bargauge", options, *panel, **dict(min=0, thresholds=thresholds(NEUTRAL)) | more)


def level_timeline(*panel: Any) -> dict:
    """Levels over time; expects numbers of `LEVELS`. It has no legend: *Level now* shows the words."""
    options = dict(
        showValue="never",
        rowHeight=0.9,
        mergeValues=True,
        perPage=0,
        legend=dict(showLegend=False, displayMode="list", placement="bottom", calcs=[]),
        tooltip=dict(mode="single", sort="none"),
    )
    look = dict(color={"mode": "thresholds"}, thresholds=thresholds(NEUTRAL), custom=dict(lineWidth=0, fillOpacity=70))
    return _panel("state-timeline", options, *panel, mappings=words(LEVELS), **look)


def heatmap(*panel: Any, axis_decimals: int) -> dict:
    """Buckets of a Prometheus histogram over time."""
    options = dict(
        calculate=False,
        color=dict(mode="opacity", fill="blue", scale="exponential", exponent=0.5, steps=64),
        yAxis=dict(unit="none", decimals=axis_decimals, axisPlacement="left"),
        cellValues=dict(unit="short", decimals=0),
        filterValues=dict(le=1e-9),
        showValue="never",
        cellGap=1,
        legend=dict(show=True),
        tooltip=dict(mode="single"),
    )
    return _panel("heatmap", options, *panel, unit="short")


def table(
    *panel: Any,
    columns: Mapping[str, str],
    excluded: Sequence[str] = ("Time",),
    sort_by: Sequence[tuple[str, bool]],
    **more: Any,
) -> dict:
    """One row for each set of labels, with the values of all queries.

    Args:
        columns: label -> title, from left to right; the value of query A is `Value #A` (`Value` if only one query has
            a result). Labels used in links must keep their names.
        excluded: labels and values that are not shown; links cannot use them.
        sort_by: (title, descending), the most important first.
    """
    options = dict(
        showHeader=True,
        cellHeight="sm",
        footer=dict(show=False, reducer=[], countRows=False),
        sortBy=[dict(displayName=name, desc=descending) for name, descending in sort_by],
    )
    organize = dict(
        excludeByName=dict.fromkeys(excluded, True),
        indexByName={field: position for position, field in enumerate(columns)},
        renameByName={field: name for field, name in columns.items() if field != name},
    )
    transformations = [dict(id="merge", options={}), dict(id="organize", options=organize)]
    custom = dict(align="auto", inspect=False)
    return _panel("table", options, *panel, **dict(custom=custom) | more) | {"transformations": transformations}


def row(panel_id: int, title: str, *panels: dict, collapsed: bool = True) -> dict:
    return dict(id=panel_id, type="row", title=title, collapsed=collapsed, panels=list(panels))


def _stack(rows: Sequence[dict]) -> list[dict]:
    """The rows from top to bottom. Panels of a collapsed row are inside it, those of an open row after it."""
    stacked, top = [], 0
    for each in rows:
        each = each | {"gridPos": dict(x=0, y=top, w=24, h=1)}
        top += 1
        panels = [
            panel | {"gridPos": panel["gridPos"] | {"y": panel["gridPos"]["y"] + top}} for panel in each["panels"]
        ]
        if each["collapsed"]:
            stacked.append(each | {"panels": panels})
        else:
            stacked += [each | {"panels": []}, *panels]
            top = max(panel["gridPos"]["y"] + panel["gridPos"]["h"] for panel in panels)
    return stacked


def variable(name: str, title: str, of: str, all_value: str | None) -> dict:
    """A variable for the label `name` of the series `of`; with `all_value` for several or all values."""
    query = f"label_values({of}, {name})"
    several = dict(allValue=all_value, current=dict(text="All", value="$__all")) if all_value else {}
    on_change_of_time_range, alphabetical = 2, 1
    return several | dict(
        type="query",
        name=name,
        label=title,
        datasource=DATASOURCE,
        query=query,
        definition=query,
        refresh=on_change_of_time_range,
        sort=alphabetical,
        multi=bool(all_value),
        includeAll=bool(all_value),
    )


def dashboard(
    uid: str, title: str, question: str, variables: Sequence[dict], *rows: dict, marks: Sequence[dict] = (), **more: Any
) -> dict:
    """A dashboard whose annotations are `marks`."""
    datasource = dict(type="datasource", name="datasource", label="Data source", query="prometheus")
    return more | dict(
        uid=uid,
        id=None,
        title=title,
        description=f"{question} Written by `python -m grafana` of the PPO gradient exporter; change it there.",
        tags=["ppo"],
        # That of Grafana 10.0, the oldest with every feature used (docs/dashboards.md). Newer versions migrate it.
        schemaVersion=38,
        editable=False,
        graphTooltip=1,
        time={"from": "now-1h", "to": "now"},
        timezone="browser",
        refresh="30s",
        templating={"list": [datasource, *variables]},
        annotations={"list": list(marks)},
        panels=_stack(rows),
    )


def run_link(values: str) -> list[dict]:
    """A link to the run dashboard. `values` is where Grafana finds the labels of the clicked item: `__data.fields` in a
    table, `__field.labels` elsewhere."""
    labels = "&".join(f"var-{name}=${{{values}.{name}:percentencode}}" for name in ("job", "run", "instance"))
    url = f"/d/{RUN_DASHBOARD_UID}?var-datasource=${{datasource:percentencode}}&{labels}&${{__url_time_range}}"
    return [dict(title="Open the run's dashboard", url=url)]
