"""Target files in a folder that Prometheus watches."""

import json
import stat
from pathlib import Path

from conftest import Observability, fetch, free_ports, wait_until
from endpoint import UPDATE, make_certificate, trained_aggregator
from runs import let_age, names, script

from exporter import MetricsServer, RunAggregator, emit_ppo_update
from exporter.serving import deliveries
from exporter.serving.deliveries import STALE_SECONDS, Deliveries
from exporter.serving.state import State
from stack import configuration


def targets(folder: Path) -> list[str]:
    """What Prometheus finds there."""
    return sorted(entry["targets"][0] for path in folder.glob("*.json") for entry in json.loads(path.read_text()))


def test_others_can_read_what_a_run_keeps_and_its_clean_end_removes_all_of_it(tmp_path: Path):
    folder = tmp_path / "new/folder"
    with script(folder, umask=0o077) as process:
        target = f"127.0.0.1:{process.port}"
        labels = {"run": "r", "instance": target, "__param_run": "r"}
        assert json.loads((folder / "ppo-r.json").read_text()) == [{"targets": [target], "labels": labels}]
        modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in folder.glob("*")}
        assert (modes["ppo-r.json"], modes["ppo-r.prom"]) == (0o644, 0o644)
        assert stat.S_IMODE(folder.stat().st_mode) == 0o755
        process.end()
    assert list(folder.iterdir()) == []


def test_a_restart_replaces_the_file_that_a_crash_left_and_a_live_run_of_the_same_name_does_not(tmp_path: Path):
    def start() -> MetricsServer:
        server = MetricsServer(trained_aggregator(), port=0)
        server.deliver("r", targets_dir=tmp_path)
        return server

    with script(tmp_path) as crashed:
        crashed.kill()
        assert targets(tmp_path) == [f"127.0.0.1:{crashed.port}"]
    with start() as again:
        assert targets(tmp_path) == [f"127.0.0.1:{again.port}"]
        with start() as beside:
            assert targets(tmp_path) == sorted(f"127.0.0.1:{server.port}" for server in (again, beside))
            assert names(tmp_path) == {"ppo-r.json", "ppo-r,2.json"} | {"ppo-r.prom"}  # no run is called `r,2` there
        assert targets(tmp_path) == [f"127.0.0.1:{again.port}"]
    assert targets(tmp_path) == []


def test_what_a_dead_process_has_left_goes_after_an_hour_and_nothing_else(tmp_path: Path, capfd):
    def path(run: str) -> Path:
        return tmp_path / f"ppo-{run}.json"

    with MetricsServer(RunAggregator(), port=0) as living:
        living.deliver("living", targets_dir=tmp_path)
        dead = MetricsServer(RunAggregator(), port=0)
        dead.deliver("old", targets_dir=tmp_path)
        dead.deliver("young", targets_dir=tmp_path)
        dead.close(crashed=True)
        for other in (path("other"), tmp_path / "other.json"):
            other.write_text("[]")
        for file in tmp_path.glob("*.json"):
            let_age(file, STALE_SECONDS + 1)
        let_age(path("young"), STALE_SECONDS - 60)  # somebody may not have been told yet
        before = names(tmp_path)
        living.deliver("next", targets_dir=tmp_path)
        assert names(tmp_path) == (before | {"ppo-next.json"}) - {"ppo-old.json"}
        assert not (tmp_path / ".ppo-old.json.lock").exists()
    assert capfd.readouterr().err.count(f"removed {path('old')}: its process has been gone for an hour") == 1


def test_a_living_process_keeps_its_file_young_and_removes_old_ones(tmp_path: Path, monkeypatch):
    monkeypatch.setattr(deliveries, "TARGET_FILE_SECONDS", 0.02)
    dead, living = Deliveries(State({}), "http"), Deliveries(State({}), "http")
    dead.add("dead", "127.0.0.1:1", str(tmp_path), None, 1.0)
    dead.end_all(crashed=True)
    living.add("living", "127.0.0.1:2", str(tmp_path), None, 1.0)
    for path in tmp_path.glob("*.json"):
        let_age(path, STALE_SECONDS + 1)
    wait_until(lambda: targets(tmp_path) == ["127.0.0.1:2"], "the old one is removed")
    first = (tmp_path / "ppo-living.json").stat().st_mtime
    wait_until(lambda: (tmp_path / "ppo-living.json").stat().st_mtime > first, "touched")
    living.end_all(crashed=False)
    assert list(tmp_path.iterdir()) == []


def test_prometheus_scrapes_each_run_of_a_process_once_over_http_and_https(start_prometheus, tmp_path: Path):
    certificate, web_config = make_certificate(tmp_path / "server.pem"), tmp_path / "web.yml"
    web_config.write_text("tls_server_config: {cert_file: server.pem, key_file: server.key}\n")
    ports, folder = free_ports(), tmp_path / "targets"
    settings = configuration.prometheus_configuration(ports, folder)
    settings["scrape_configs"] = [job for job in settings["scrape_configs"] if job["job_name"] == "ppo"]
    settings["scrape_configs"][0].update(
        scrape_interval="1s", scrape_timeout="1s", tls_config={"ca_file": str(certificate)}
    )
    del settings["rule_files"]

    aggregator = trained_aggregator()
    aggregator.register_run("walker/17 ü", ["op", "slot"])
    emit_ppo_update(UPDATE, run="walker/17 ü", handler=aggregator)
    with (
        MetricsServer(aggregator, port=0) as plain,
        MetricsServer(trained_aggregator(), port=0, process_labels={"rank": "1"}, web_config_file=web_config) as secure,
    ):
        served = {("r", plain.port), ("walker/17 ü", plain.port), ("r", secure.port)}
        for run, port in served:
            (plain if port == plain.port else secure).deliver(run, targets_dir=folder)
        start_prometheus(ports.prometheus, settings)
        query = Observability(ports, folder, tmp_path / "none", {}).query
        wait_until(lambda: len(query("sum_over_time(up[1h]) >= 3")) == 3, "three scrapes of each run")

        instances = {(run, f"127.0.0.1:{port}") for run, port in served}
        for metric in ("up", "ppo_updates_total", "process_start_time_seconds", "ppo_exporter_collector_success"):
            found = [sample["metric"] for sample in query(f'{metric}{{job="ppo"}} > 0')]
            assert {(labels["run"], labels["instance"]) for labels in found} == instances, metric
        assert len(query("up == 1")) == 3
        # By the targets of its process each run would be scraped several times.
        once = "count_over_time(ppo_updates_total[1h]) == on (run, instance) sum_over_time(up[1h])"
        assert len(query(once)) == 3
        told = fetch(f"{ports.url('prometheus')}/metrics")[1]
        for trouble in ("duplicate_timestamp", "out_of_order"):
            assert f"\nprometheus_target_scrapes_sample_{trouble}_total 0\n" in told
