"""docker-compose.yml against the files that it uses; no container runs here."""

import re

import pytest
import yaml

from stack.configuration import Ports
from stack.servers import ROOT

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


@pytest.mark.parametrize("name", [name for name, service in SERVICES.items() if "image" in service])
def test_images_are_pinned(name):
    assert re.fullmatch(r"[a-z/]+:v?\d+\.\d+\.\d+", SERVICES[name]["image"])


def test_all_share_one_network_namespace_and_publish_to_this_machine_only():
    owner = SERVICES["prometheus"]
    assert all(s["network_mode"] == "service:prometheus" for s in SERVICES.values() if s is not owner)
    published = [port.split(":") for port in owner["ports"]]
    assert all(address == "127.0.0.1" and outer == inner for address, outer, inner in published)
    assert {int(inner) for _, _, inner in published} <= set(vars(Ports()).values())
