"""Prometheus and Alertmanager: those on PATH, else Debian's packages unpacked into `.servers`.

`python -m stack.servers` makes sure that they are there and says which ones are used.
"""

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
DIRECTORY = ROOT / ".servers"
ADVICE = "install Prometheus and Alertmanager and put prometheus, promtool, alertmanager and amtool on PATH"


class ServersMissing(RuntimeError):
    """A server is neither on PATH nor to be had from the distribution's packages."""


@dataclass(frozen=True)
class Servers:
    """Executables, and the options that tell an unpacked Prometheus where its own files lie."""

    prometheus: Path
    promtool: Path
    alertmanager: Path
    amtool: Path
    prometheus_options: tuple[str, ...] = ()


def provide(directory: Path = DIRECTORY) -> Servers:
    """Find the four executables, fetching what is missing into `directory`.

    Raises:
        ServersMissing: nothing on PATH and no package to be had; the message says what to do.
    """
    prometheus, promtool, unpacked = _pair("prometheus", ["prometheus"], "promtool", directory)
    prometheus_options: tuple[str, ...] = ()
    if unpacked:
        # Debian's build reads its web pages from disk, and asks for another place by an option of its own.
        prometheus_options = (
            f"--web.local-assets={unpacked}/usr/share/prometheus/web/",
            f"--web.console.templates={unpacked}/etc/prometheus/consoles",
            f"--web.console.libraries={unpacked}/etc/prometheus/console_libraries",
        )
    alertmanager, amtool, _ = _pair(
        "prometheus-alertmanager", ["alertmanager", "prometheus-alertmanager"], "amtool", directory
    )
    return Servers(prometheus, promtool, alertmanager, amtool, prometheus_options)


def package_root(package: str, directory: Path = DIRECTORY) -> Path:
    """The folder that holds what Debian's `package` installs, fetched if it is not there yet.

    Raises:
        ServersMissing: there is no package to be had; the message says what to do.
    """
    root = directory / package
    if not root.exists():
        _fetch(package, root)
    return root


def _pair(package: str, names: list[str], tool: str, directory: Path) -> tuple[Path, Path, Path | None]:
    """A server, its tool, and the folder they were unpacked into (None: both are on PATH)."""
    server_on_path = next(filter(None, map(shutil.which, names)), None)
    tool_on_path = shutil.which(tool)
    if server_on_path and tool_on_path:
        return Path(server_on_path), Path(tool_on_path), None
    root = package_root(package, directory)
    server = next((path for name in names if (path := root / "usr/bin" / name).exists()), None)
    if server is None or not (root / "usr/bin" / tool).exists():
        raise ServersMissing(f"{root} lacks {' / '.join(names)} or {tool}; delete it and run `make setup`, or {ADVICE}")
    return server, root / "usr/bin" / tool, root


def _fetch(package: str, root: Path) -> None:
    """Download `package` with the pages its web interface needs, and unpack all into `root`."""
    missing = [command for command in ("apt-get", "apt-cache", "dpkg") if shutil.which(command) is None]
    if missing:
        raise ServersMissing(f"{package} is not on PATH, and this machine has no {', '.join(missing)}: {ADVICE}")
    started = time.monotonic()
    print(f"Fetching {package} from the distribution's packages ...", flush=True)
    root.parent.mkdir(parents=True, exist_ok=True)
    # Renamed into place only when whole, so that an interrupted fetch leaves nothing that looks finished.
    with tempfile.TemporaryDirectory(dir=root.parent, prefix="unfinished-") as work:
        downloads, unpacked = Path(work, "downloads"), Path(work, "unpacked")
        downloads.mkdir()
        try:
            _download(package, downloads, ())
        except subprocess.CalledProcessError as first_error:
            # Lists missing, or so old that the packages they name are gone: use lists of our own, which
            # needs no root and leaves the system's alone.
            try:
                options = _update_lists(root.parent / "apt")
                _download(package, downloads, options)
            except subprocess.CalledProcessError as error:
                raise ServersMissing(
                    f"could not fetch {package}: {_reasons(error) or _reasons(first_error)}\n"
                    f"Check the network and run `make setup` again, or {ADVICE}"
                ) from error
        for archive in sorted(downloads.glob("*.deb")):
            subprocess.run(["dpkg", "-x", archive, unpacked], check=True)
        if package == "prometheus-alertmanager":
            _make_relocatable(unpacked)
        try:
            unpacked.rename(root)
        except OSError:
            if not root.exists():  # else another process was faster
                raise
    print(f"  {package}: ready after {time.monotonic() - started:.0f} s", flush=True)


def _download(package: str, downloads: Path, options: tuple[str, ...]) -> None:
    relations = ["recommends", "suggests", "enhances", "conflicts", "breaks", "replaces"]
    depends = _apt(
        ["apt-cache", *options, "depends", "--recurse", *(f"--no-{name}" for name in relations), package], downloads
    )
    pages = {line for line in depends.splitlines() if line.startswith(("libjs-", "fonts-"))}
    _apt(["apt-get", *options, "download", package, *sorted(pages)], downloads)


def _make_relocatable(root: Path) -> None:
    """Let Debian's Alertmanager run from `root`.

    Its build reads its notification templates from a fixed folder, which no option changes, and does
    not start without them. The name of that folder is overwritten by an equally long one that stands
    for a file descriptor, and a wrapper opens this descriptor on the unpacked folder.
    """
    fixed = b"/usr/share/prometheus/alertmanager"
    real, wrapper = root / "usr/lib/prometheus-alertmanager", root / "usr/bin/prometheus-alertmanager"
    real.parent.mkdir(exist_ok=True)
    real.write_bytes(wrapper.read_bytes().replace(fixed, b"/proc/self/fd/9".ljust(len(fixed), b"/")))
    real.chmod(0o755)
    wrapper.write_text(
        "#!/bin/sh\n"
        'usr=$(dirname "$(dirname "$(readlink -f "$0")")")\n'
        'exec 9< "$usr/share/prometheus/alertmanager"\n'
        'exec "$usr/lib/prometheus-alertmanager" "$@"\n'
    )


def _update_lists(directory: Path) -> tuple[str, ...]:
    """Fetch package lists into `directory`; the options with which apt uses them."""
    lists, cache = directory / "lists", directory / "cache"
    for folder in (lists / "partial", cache / "archives" / "partial"):
        folder.mkdir(parents=True, exist_ok=True)
    options = ["-o", f"Dir::State::Lists={lists}", "-o", f"Dir::Cache={cache}"]
    if os.geteuid() == 0:
        # apt's download user may not enter the folder of a checkout.
        options += ["-o", "APT::Sandbox::User=root"]
    print("  updating package lists ...", flush=True)
    _apt(["apt-get", *options, "-o", "APT::Update::Error-Mode=any", "update"], directory)
    return tuple(options)


def _apt(command: list[str], directory: Path) -> str:
    environment = {**os.environ, "LC_ALL": "C.UTF-8", "DEBIAN_FRONTEND": "noninteractive"}
    done = subprocess.run(command, cwd=directory, env=environment, check=True, capture_output=True, text=True)
    return done.stdout


def _reasons(error: subprocess.CalledProcessError) -> str:
    lines = [line for line in error.stderr.splitlines() if line.startswith(("E:", "W:"))]
    return " ".join(lines[-3:])


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m stack.servers", description=__doc__)
    parser.parse_args()
    try:
        servers = provide()
    except ServersMissing as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    for name in ("prometheus", "promtool", "alertmanager", "amtool"):
        print(f"  {name}: {getattr(servers, name)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
