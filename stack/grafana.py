"""Grafana for `make run`: the one on PATH, else the one in `.servers/grafana`.

`python -m stack.grafana` fetches the publisher's archive, checks its SHA-256 and unpacks it into `.servers/grafana`.
"""

import argparse
import hashlib
import http.client
import platform
import shutil
import sys
import tempfile
import urllib.request
from pathlib import Path

from stack.servers import DIRECTORY as SERVERS

DIRECTORY = SERVERS / "grafana"
VERSION = "12.4.2"  # docker-compose.yml has a later one; this is the newest with known checksums, see below
URL = "https://dl.grafana.com/grafana/release/{0}/grafana_{0}_23531306697_linux_{1}.tar.gz"
# Machine -> the publisher's name for it, and the archive's SHA-256. These archives were not downloaded for this: the
# sums are those that packagers of the same files have pinned (two for amd64, one for arm64).
ARCHIVES = {
    "x86_64": ("amd64", "f240b200a803bf64592fae645331750c2681df5f07496743d714db12393a591f"),
    "aarch64": ("arm64", "28f37f0952e923e90aed02c7d71cef7443705a9a37ba5439b76d7f72aeb1a63f"),
}


class GrafanaError(RuntimeError):
    """Grafana cannot be fetched; the message says why and what to do."""


def find() -> tuple[list[str], Path] | None:
    """The command that starts Grafana's server, and its home folder; None if there is no Grafana with its files."""
    for name in ("grafana", "grafana-server", f"{DIRECTORY}/bin/grafana"):
        if path := shutil.which(name):
            root = Path(path).resolve().parents[1]
            for home in (root, root / "share/grafana", Path("/usr/share/grafana")):
                if (home / "conf/defaults.ini").exists():
                    return ([path] if name == "grafana-server" else [path, "server"]), home
    return None


def environment(port: int, data: Path, provisioning: Path) -> dict[str, str]:
    """Settings of a Grafana on 127.0.0.1 that sends nothing to the internet. Creates folders that Grafana expects."""
    for folder in (data / "plugins", provisioning / "plugins", provisioning / "alerting"):
        folder.mkdir(parents=True, exist_ok=True)
    return {
        "GF_PATHS_PROVISIONING": str(provisioning),
        "GF_PATHS_DATA": str(data),
        "GF_PATHS_LOGS": str(data / "log"),
        "GF_PATHS_PLUGINS": str(data / "plugins"),
        "GF_SERVER_HTTP_ADDR": "127.0.0.1",
        "GF_SERVER_HTTP_PORT": str(port),
        "GF_ANALYTICS_REPORTING_ENABLED": "false",
        "GF_ANALYTICS_CHECK_FOR_UPDATES": "false",
        "GF_ANALYTICS_CHECK_FOR_PLUGIN_UPDATES": "false",
        "GF_PLUGINS_PREINSTALL_DISABLED": "true",
        # On this machine, viewing needs no password; changing does.
        "GF_AUTH_ANONYMOUS_ENABLED": "true",
    }


def fetch(directory: Path, url: str = "", sha256: str = "") -> None:
    """Install Grafana into `directory`, replacing another version. Does nothing if the same archive is installed.

    Args:
        url: address of an archive; empty: the publisher's archive of VERSION for this machine.
        sha256: its checksum in hexadecimal digits; empty: that of the publisher's archive.

    Raises:
        GrafanaError: no archive for this machine, no network, another checksum, or no Grafana in the archive.
    """
    machine = f"{platform.system()} {platform.machine()}"
    name, published = ARCHIVES.get(machine.removeprefix("Linux "), ("", ""))
    if not name and not (url and sha256):
        raise GrafanaError(
            f"no archive of Grafana is known for {machine}; name one with --url and --sha256, or install Grafana"
        )
    url, sha256 = url or URL.format(VERSION, name), (sha256 or published).lower()
    stamp = directory / ".sha256"
    if stamp.exists() and stamp.read_text() == sha256:
        return
    directory.parent.mkdir(parents=True, exist_ok=True)
    # Rename into place only when complete, so that an interrupted download never looks finished.
    with tempfile.TemporaryDirectory(dir=directory.parent, prefix="unfinished-") as work:
        archive, unpacked = Path(work, "grafana.tar.gz"), Path(work, "unpacked")
        try:
            with urllib.request.urlopen(url, timeout=60) as answer, archive.open("wb") as file:
                size = int(answer.headers.get("Content-Length") or 0) / 1e6
                print(f"Fetching {url} ({size:.0f} MB) ...", flush=True)
                shutil.copyfileobj(answer, file, 1 << 20)
        except (OSError, ValueError, http.client.HTTPException) as error:
            raise GrafanaError(
                f"cannot fetch {url}: {error}\nCheck the network and try again, or name a mirror with --url, or "
                "install Grafana and put it on PATH"
            ) from error
        with archive.open("rb") as file:
            found = hashlib.file_digest(file, "sha256").hexdigest()
        if found != sha256:
            raise GrafanaError(
                f"{url} has the SHA-256 {found}, but {sha256} was expected: it is damaged or not the published one. "
                "Nothing was kept; try again"
            )
        try:
            shutil.unpack_archive(archive, unpacked)
            [executable] = unpacked.glob("*/bin/grafana")
        except (OSError, ValueError) as error:
            raise GrafanaError(f"{url} is not an archive of a folder with bin/grafana: {error}") from error
        home = executable.parents[1]
        (home / ".sha256").write_text(sha256)
        if directory.exists():
            directory.rename(Path(work, "replaced"))
        home.rename(directory)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m stack.grafana", description=__doc__)
    parser.add_argument("--url", default="", help=f"an archive (.tar.gz) elsewhere; default: Grafana {VERSION}")
    parser.add_argument("--sha256", default="", help="its checksum; needed for another archive")
    options = parser.parse_args(arguments)
    try:
        fetch(DIRECTORY, options.url, options.sha256)
    except GrafanaError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("Interrupted; nothing was kept.", file=sys.stderr)
        return 130
    print(f"  grafana: {DIRECTORY}; `make run` starts it")
    return 0


if __name__ == "__main__":
    sys.exit(main())
