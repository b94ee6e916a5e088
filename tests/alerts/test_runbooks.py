"""Every alert has a runbook, with the same sections, links to panels that exist, and numbers that hold."""

import json
import re
from pathlib import Path
from urllib.parse import parse_qs, urlsplit

import pytest

from exporter import gradient_cv
from exporter.metrics import METRIC_FAMILIES
from mixin.__main__ import REPOSITORY
from mixin.alerts import alerts
from mixin.config import MixinConfig

RUNBOOKS = REPOSITORY / "docs/runbooks"
PAGES = sorted(RUNBOOKS.glob("PPO*.md"))
SECTIONS = [
    "What it means",
    "What to look at first",
    "Likely causes",
    "What to try",
    "When to ignore it",
]
# Five dead heads of seven, the others equal.
CALCULATED = {f"{gradient_cv([1, 1, 0, 0, 0, 0, 0]):.2f}"}


def sections(page: Path) -> dict[str, str]:
    parts = re.split(r"^## (.+)\n", page.read_text(), flags=re.MULTILINE)
    return dict(zip(parts[1::2], parts[2::2], strict=True))


def test_every_alert_has_a_runbook_and_every_runbook_an_alert():
    assert {page.stem for page in PAGES} == {alert.name for alert in alerts(MixinConfig())}


def named(text: str) -> set[str]:
    """Panels that the text links to, by the names in brackets whose addresses stand at the page's end."""
    text = " ".join(re.sub(r"^\[.+\]: .+$", "", text, flags=re.MULTILINE).split())
    return set(re.findall(r"\[([^]]+)\](?!\()", text))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_a_runbook_has_its_sections_and_severities(page: Path):
    head = page.read_text().split("\n## ")[0]
    assert head.startswith(f"# {page.stem}\n\nSeverity: ")
    assert all(alert.severity in head for alert in alerts(MixinConfig()) if alert.name == page.stem)
    assert list(sections(page)) == SECTIONS
    for name, text in sections(page).items():
        assert len(text.split()) > 8, name


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_a_runbook_links_to_panels_by_their_titles(page: Path):
    config = MixinConfig()
    board = json.loads((REPOSITORY / "grafana/dashboards/ppo-gradient-health.json").read_text())
    titles = {panel["id"]: panel["title"] for panel in board["panels"]}
    links = dict(re.findall(r"^\[(.+)\]: (\S+)$", page.read_text(), re.MULTILINE))
    for title, link in links.items():
        assert link.startswith(f"{config.grafana_url}/d/{board['uid']}?")
        (panel,) = parse_qs(urlsplit(link).query)["viewPanel"]
        assert titles[int(panel)] == title
    assert named(page.read_text()) == set(links)
    assert named(sections(page)["What to look at first"])


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_a_runbook_names_no_number_that_a_site_could_change(page: Path):
    text = re.sub(r"^\[.+\]: .+$|^\d\. |`[^`]*`", "", page.read_text(), flags=re.MULTILINE)
    assert set(re.findall(r"\d+(?:\.\d+)?", text)) <= CALCULATED


def test_runbooks_name_only_metrics_that_exist():
    exported = {family.name for family in METRIC_FAMILIES}
    for page in PAGES:
        assert set(re.findall(r"\bppo_\w+", page.read_text())) <= exported, page.name
