"""docker-compose.yml against the files that it uses; no container runs here."""

import re
import subprocess
from pathlib import Path, PurePosixPath

import pytest
import yaml

from stack import grafana
from stack.configuration import Ports
from stack.servers import ROOT, Servers
from trainer.config import TelemetryConfig, TrainerConfig

COMPOSE = yaml.safe_load((ROOT / "docker-compose.yml").read_text())
SERVICES = COMPOSE["services"]


def test_mounted_files_and_volumes_exist():
    for name, service in SERVICES.items():
        for volume in service["volumes"]:
            source = volume.split(":")[0]
            if source.startswith("."):
                assert (ROOT / source).exists(), f"{name} mounts {source}"
            else:
                assert source in COMPOSE["volumes"], f"{name} mounts {source}"
        for dependency in service.get("depends_on", []):
            assert dependency in SERVICES


def mounts(name: str) -> dict[PurePosixPath, str]:
    """What is mounted in a service, by its place in the container."""
    pairs = (volume.removesuffix(":ro").split(":") for volume in SERVICES[name]["volumes"])
    return {PurePosixPath(place): source for source, place in pairs}


@pytest.fixture(scope="module")
def written(tmp_path_factory) -> Path:
    """What the service `configuration` writes, by its own command, from the files that are mounted there."""
    work = tmp_path_factory.mktemp("compose")
    repository, configuration = work / "repository", work / "configuration"
    repository.mkdir()
    configuration.mkdir()
    (configuration / "left-over.yml").touch()
    for place, source in mounts("configuration").items():
        if place.is_relative_to("/repository"):
            (repository / place.relative_to("/repository")).symlink_to(ROOT / source)
    *shell, script = SERVICES["configuration"]["command"]
    for folder in (repository, configuration):
        script = re.sub(rf"(?<![\w.])/{folder.name}\b", str(folder), script)
    subprocess.run([*shell, script], check=True, capture_output=True, text=True)
    return configuration


def test_every_server_is_named_by_its_service(written):
    assert not (written / "left-over.yml").exists()
    text = "".join(path.read_text() for path in written.rglob("*.y*ml"))
    for name in ("prometheus", "alertmanager", "receiver"):
        port = getattr(Ports(), name)
        assert name in SERVICES and f"{name}:{port}" in text
        assert not re.findall(rf"(?:127\.0\.0\.1|localhost):{port}", text)


def test_servers_accept_what_is_written(servers: Servers, written):
    prometheus, alertmanager = written / "prometheus.yml", written / "alerts/alertmanager.yml"
    for command in ([servers.promtool, "check", "config", prometheus], [servers.amtool, "check-config", alertmanager]):
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
    for service, path in (("prometheus", prometheus), ("alertmanager", alertmanager)):
        place = f"/configuration/{path.relative_to(written)}"
        assert f"--config.file={place}" in SERVICES[service]["command"]
    for path in ("GF_PATHS_PROVISIONING", "PPO_DASHBOARDS_PATH"):
        place = PurePosixPath(SERVICES["grafana"]["environment"][path])
        assert (written / place.relative_to("/configuration")).is_dir()


def test_grafana_calls_nobody_in_a_container_either(tmp_path):
    def settings(environment: dict[str, str]) -> dict[str, str]:
        own = ("GF_PATHS_", "GF_SERVER_", "PPO_")
        return {name: value for name, value in environment.items() if not name.startswith(own)}

    here = grafana.environment(Ports().grafana, tmp_path, tmp_path)
    assert settings(SERVICES["grafana"]["environment"]) == settings(here)


def test_prometheus_finds_the_target_files_of_the_trainer(written):
    assert mounts("prometheus")[PurePosixPath("/targets")] == "targets"
    assert (written / TelemetryConfig().targets_dir).readlink() == Path("/targets")
    command = SERVICES["trainer"]["command"]
    assert command[command.index("--metrics-target") + 1] == f"trainer:{Ports().metrics}"


def test_what_is_written_in_the_image_is_a_volume_and_belongs_to_its_user():
    trainer, image = TrainerConfig(), (ROOT / "Dockerfile").read_text()
    home = PurePosixPath(re.search(r"^WORKDIR (.+)$", image, re.MULTILINE)[1])
    user = re.search(r"^USER (.+)$", image, re.MULTILINE)[1]
    written = {"trainer": [TelemetryConfig().targets_dir, trainer.checkpoint_dir], "receiver": [".stack"]}
    for service, folders in written.items():
        assert set(mounts(service)) == {home / folder for folder in folders}
        assert not [volume for volume in SERVICES[service]["volumes"] if volume.endswith(":ro")]
        for folder in folders:
            assert re.search(rf"mkdir [^&]*(?<!\S){re.escape(folder)}(?!\S)", image), folder
            assert re.search(rf"chown {user} [^&\n]*(?<!\S){re.escape(folder)}(?!\S)", image), folder


@pytest.mark.parametrize("name", [name for name, service in SERVICES.items() if "image" in service])
def test_images_are_pinned(name):
    assert re.fullmatch(r"[a-z/]+:v?\d+\.\d+\.\d+", SERVICES[name]["image"])


def test_services_share_no_network_namespace_and_publish_to_this_machine_only():
    assert {service.get("network_mode") for service in SERVICES.values()} == {None, "none"}
    assert SERVICES["configuration"]["network_mode"] == "none"
    ports = {"trainer": "metrics"}
    for name, service in SERVICES.items():
        for address, outer, inner in (port.split(":") for port in service.get("ports", [])):
            assert address == "127.0.0.1"
            assert int(outer) == int(inner) == getattr(Ports(), ports.get(name, name))
