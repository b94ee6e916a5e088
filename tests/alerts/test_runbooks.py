"""Every alert has a runbook: an instruction first, links to existing panels, and queries that work as written."""

import json
import re
import shutil
import subprocess
from pathlib import Path
from urllib.parse import parse_qs, urlsplit

import promql_parser
import pytest
import yaml

from exporter.metrics import METRIC_FAMILIES
from stack.servers import ROOT

RUNBOOKS = ROOT / "docs/runbooks"
PAGES = sorted(RUNBOOKS.glob("PPO*.md"))
INDEX = (RUNBOOKS / "README.md").read_text()
GROUPS = yaml.safe_load((ROOT / "alerts/ppo.rules.yml").read_text())["groups"]
ALERTS = [rule for group in GROUPS for rule in group["rules"] if "alert" in rule]
RECORDS = {rule["record"] for group in GROUPS for rule in group["rules"] if "record" in rule}
SECTIONS = ["What it means", "What to look at first", "Likely causes", "What to try", "When to ignore it"]
# Of Prometheus, Alertmanager, node_exporter and the trainer's process.
OTHERS = re.compile(r"up|ALERTS|(prometheus|alertmanager|node|process)_\w+")

each_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)


def blocks(text: str, kind: str) -> list[str]:
    return re.findall(rf"^ *```{kind}\n(.*?)^ *```$", text, re.MULTILINE | re.DOTALL)


def series(query: str) -> set[str]:
    """Names of the series that a query reads.

    Raises:
        ValueError: it is no PromQL.
    """
    names = set()

    def visit(node: promql_parser.Expr) -> None:
        if isinstance(node, promql_parser.VectorSelector):
            names.add(node.name)

    promql_parser.walk(promql_parser.parse(query), visit)
    return names


def test_every_alert_has_a_runbook_and_a_line_in_the_index():
    urls = {rule["alert"]: rule["annotations"]["runbook_url"] for rule in ALERTS}
    assert urls == {page.stem: f"docs/runbooks/{page.name}" for page in PAGES}
    assert sorted(re.findall(r"^\|.*\[(\w+)\]\(\1\.md\)", INDEX, re.MULTILINE)) == sorted(urls)


@each_page
def test_a_runbook_begins_with_its_severities_and_one_order(page: Path):
    title, severity, order, *_ = page.read_text().split("\n\n")
    assert title == f"# {page.stem}"
    assert severity.startswith("Severity: ")
    assert all(rule["labels"]["severity"] in severity for rule in ALERTS if rule["alert"] == page.stem)
    assert re.fullmatch(r"\*\*[A-Z][^.]+\.\*\*", order)
    present = re.findall(r"^## (.+)$", page.read_text(), re.MULTILINE)
    assert present == [section for section in SECTIONS if section in present] and present[:2] == SECTIONS[:2]


@each_page
def test_a_runbook_links_to_panels_by_their_titles(page: Path):
    board = json.loads((ROOT / "grafana/dashboards/ppo-gradient-health.json").read_text())
    panels = [panel for row in board["panels"] for panel in (row, *row.get("panels", []))]
    titles = {panel["id"]: panel["title"] for panel in panels}
    links = dict(re.findall(r"^\[(.+)\]: (\S+)$", page.read_text(), re.MULTILINE))
    for title, link in links.items():
        assert urlsplit(link).path == f"/d/{board['uid']}"
        (panel,) = parse_qs(urlsplit(link).query)["viewPanel"]
        assert titles[int(panel)] == title
    text = re.sub(r"^\[.+\]: .+$|```[^`]+```|`[^`]+`", "", page.read_text(), flags=re.MULTILINE)
    assert set(re.findall(r"\[([^]]+)\](?!\()", " ".join(text.split()))) == set(links)


@each_page
def test_queries_can_be_pasted_and_read_series_that_exist(page: Path):
    families = {family.name for family in METRIC_FAMILIES}
    buckets = {f"{family.name}_bucket" for family in METRIC_FAMILIES if family.kind == "histogram"}
    queries = blocks(page.read_text(), "promql")
    assert queries
    for query in queries:
        for name in series(query):
            assert name in families | buckets | RECORDS or OTHERS.fullmatch(name), query
    assert set(re.findall(r"`(ppo_\w+)`", page.read_text())) <= families


def test_the_documented_command_makes_every_link_the_sites_own(servers, tmp_path: Path):
    for folder in ("alerts", "deploy", "docs"):
        shutil.copytree(ROOT / folder, tmp_path / folder)
    command = INDEX.partition("<!-- links:")[2].partition("```\n")[2].partition("```")[0]
    subprocess.run(["sh", "-euc", command], cwd=tmp_path, check=True)

    for file in tmp_path.rglob("*.*"):
        if file.is_file() and file.suffix in (".md", ".yml", ".yaml"):
            assert "http://127.0.0.1:3000" not in file.read_text().replace(command, ""), file
    for rules in (tmp_path / "alerts/ppo.rules.yml", tmp_path / "deploy/kubernetes/monitoring/prometheus-rule.yaml"):
        links = re.findall(r"(?:dashboard|runbook)_url: (\S+)", rules.read_text())
        assert links and all(re.match(r"https://(grafana|git)\.example\.org/", link) for link in links)
    command = [servers.promtool, "check", "rules", tmp_path / "alerts/ppo.rules.yml"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
