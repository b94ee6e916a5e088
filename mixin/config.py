"""What a site may want to change: every field is an option of `python -m mixin`."""

from dataclasses import dataclass, field


def _option(default: str, documentation: str) -> str:
    return field(default=default, metadata={"help": documentation})


@dataclass(frozen=True)
class MixinConfig:
    """Addresses and names that the generated files carry."""

    job: str = _option("ppo", "name of the scrape job in Prometheus")
    prometheus_url: str = _option("http://127.0.0.1:9090", "Prometheus, as Grafana's server reaches it")
    alertmanager_url: str = _option("http://127.0.0.1:9093", "Alertmanager, as Grafana's server reaches it")
    dashboards_path: str = _option(
        "$PPO_DASHBOARDS_PATH",
        "folder of the dashboards on Grafana's server; by default Grafana reads it from that environment variable",
    )
    runbook_base_url: str = _option(
        "docs/runbooks", "where the runbooks are published; by default their folder in this repository"
    )

    def runbook_url(self, alert: str) -> str:
        """Address of the page about `alert`."""
        return f"{self.runbook_base_url.rstrip('/')}/{alert}.md"
