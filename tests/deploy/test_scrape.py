"""The scrape job: whose labels win, and that the file for `scrape_config_files` has the same one."""

import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import yaml
from conftest import Observability, free_ports, wait_until

from stack import configuration
from stack.servers import ROOT

EXPOSITION = b"""\
ppo_gradient_cv{run="walker",health="healthy",job="forged",instance="forged"} 0.3
process_cpu_seconds_total 1
"""


class _Trainer(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        self.send_response(200)
        self.send_header("Content-Type", "text/plain; version=0.0.4")
        self.end_headers()
        self.wfile.write(EXPOSITION)

    def log_message(self, *arguments: object) -> None:
        pass


def job() -> dict:
    (found,) = yaml.safe_load((ROOT / "ppo.scrape.yml").read_text())["scrape_configs"]
    return found


def test_both_files_have_the_same_job():
    jobs = yaml.safe_load((ROOT / "prometheus.yml").read_text())["scrape_configs"]
    assert [each for each in jobs if each["job_name"] == "ppo"] == [job()]


def test_the_run_is_the_trainers_and_the_rest_prometheus_own(start_prometheus, tmp_path):
    ports, targets = free_ports(), tmp_path / "targets"
    settings = configuration.prometheus_configuration(ports, targets)
    del settings["rule_files"]
    with ThreadingHTTPServer(("127.0.0.1", 0), _Trainer) as trainer:
        threading.Thread(target=trainer.serve_forever, daemon=True).start()
        address = f"127.0.0.1:{trainer.server_port}"
        targets.mkdir()
        (targets / "ppo-walker.json").write_text(json.dumps([{"targets": [address], "labels": {"run": "walker"}}]))
        quick = {**job(), "scrape_interval": "1s", "scrape_timeout": "1s"}
        quick["file_sd_configs"][0]["files"] = [str(targets / "*.json")]
        del (static := {**quick})["file_sd_configs"]
        settings["scrape_configs"] = [
            quick,
            {**static, "job_name": "bare", "static_configs": [{"targets": [address]}]},
            {**static, "job_name": "named", "static_configs": [{"targets": [address], "labels": {"run": "other"}}]},
        ]
        start_prometheus(ports.prometheus, settings)
        query = Observability(ports, targets, tmp_path / "none", {}).query
        wait_until(lambda: len(query("count_over_time(ppo_gradient_cv[1h])")) == 3, "all three are scraped")

        def labels(metric: str) -> dict[str, dict[str, str]]:
            found = [sample["metric"] for sample in query(f"last_over_time({metric}[1h])")]
            assert len(found) == 3 and {each["instance"] for each in found} == {address}
            return {each["job"]: {key: each[key] for key in ("run", "exported_run") if key in each} for each in found}

        assert labels("ppo_gradient_cv") == dict.fromkeys(("ppo", "bare", "named"), {"run": "walker"})
        for metric in ("up", "process_cpu_seconds_total"):
            assert labels(metric) == {"ppo": {"run": "walker"}, "bare": {}, "named": {"run": "other"}}
        trainer.shutdown()
