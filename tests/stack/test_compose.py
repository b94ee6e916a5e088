"""docker-compose.yml against the files that it uses; no container runs here."""

import re
from pathlib import PurePosixPath

import pytest
import yaml

from stack.configuration import Ports
from stack.servers import ROOT
from trainer.config import TrainerConfig

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


@pytest.mark.parametrize(
    ("service", "file", "sections"),
    [
        ("alertmanager", "alerts/alertmanager.yml", ["templates"]),
        ("prometheus", "prometheus.yml", ["rule_files"]),
    ],
)
def test_what_a_configuration_names_beside_itself_is_mounted_beside_it(service, file, sections):
    by_source = {source: place for place, source in mounts(service).items()}
    folder = by_source[f"./{file}"].parent
    for pattern in (pattern for section in sections for pattern in yaml.safe_load((ROOT / file).read_text())[section]):
        source = (ROOT / mounts(service)[(folder / pattern).parent]).resolve()
        assert source == (ROOT / file).parent / PurePosixPath(pattern).parent
        assert list(source.glob(PurePosixPath(pattern).name))


def test_what_is_written_in_the_image_is_a_volume_and_belongs_to_its_user():
    trainer, image = TrainerConfig(), (ROOT / "Dockerfile").read_text()
    home = PurePosixPath(re.search(r"^WORKDIR (.+)$", image, re.MULTILINE)[1])
    user = re.search(r"^USER (.+)$", image, re.MULTILINE)[1]
    written = {"trainer": [trainer.targets_dir, trainer.checkpoint_dir], "receiver": [".stack"]}
    for service, folders in written.items():
        assert set(mounts(service)) == {home / folder for folder in folders}
        assert not [volume for volume in SERVICES[service]["volumes"] if volume.endswith(":ro")]
        for folder in folders:
            assert re.search(rf"mkdir [^&]*(?<!\S){re.escape(folder)}(?!\S)", image), folder
            assert re.search(rf"chown {user} [^&\n]*(?<!\S){re.escape(folder)}(?!\S)", image), folder


@pytest.mark.parametrize("name", [name for name, service in SERVICES.items() if "image" in service])
def test_images_are_pinned(name):
    assert re.fullmatch(r"[a-z/]+:v?\d+\.\d+\.\d+", SERVICES[name]["image"])


def test_all_share_one_network_namespace_and_publish_to_this_machine_only():
    owner = SERVICES["prometheus"]
    assert all(s["network_mode"] == "service:prometheus" for s in SERVICES.values() if s is not owner)
    published = [port.split(":") for port in owner["ports"]]
    assert all(address == "127.0.0.1" and outer == inner for address, outer, inner in published)
    assert {int(inner) for _, _, inner in published} <= set(vars(Ports()).values())
