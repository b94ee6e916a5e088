"""Prometheus and Alertmanager: those on PATH, else the distribution's packages unpacked into `.servers`.

`python -m stack.servers` provides them and prints which ones are used. For tests, Debian's newest versions are
unpacked into `.servers/newest`: delete that folder to fetch them again.
"""

import argparse
import functools
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
DIRECTORY = ROOT / ".servers"
ADVICE = "install {} with its tools and put them on PATH"
NEWEST = "deb [signed-by=/usr/share/keyrings/debian-archive-keyring.gpg] {} sid main\n"  # {}: the system's mirror
# In some releases a separate package, on which the server's package depends.
TOOLS = ("promtool", "amtool")


class ServersMissing(RuntimeError):
    """A server is neither on PATH nor in the distribution's packages; the message says what to do."""


@dataclass(frozen=True)
class Servers:
    """Executables, and the options that tell an unpacked Prometheus where its files are."""

    prometheus: Path
    promtool: Path
    alertmanager: Path
    amtool: Path
    prometheus_options: tuple[str, ...] = ()

    def versions(self) -> str:
        """For example `Prometheus 2.42.0, Alertmanager 0.25.0`."""
        found = []
        for server in (self.prometheus, self.alertmanager):
            done = subprocess.run([server, "--version"], check=True, capture_output=True, text=True)
            # prometheus, version 2.42.0+ds (branch: debian/sid, ...; older ones write it to stderr
            name, _, version = (done.stdout or done.stderr).split()[:3]
            found.append(f"{name.strip(',').capitalize()} {version.partition('+')[0]}")
        return ", ".join(found)


def provide(directory: Path = DIRECTORY, newest: bool = False) -> Servers:
    """Find the four executables, fetching what is missing into `directory`.

    Args:
        newest: use those of Debian's unstable release and ignore PATH.

    Raises:
        ServersMissing: a server is not on PATH, and no package is available.
    """
    sources = NEWEST.format(_debian_mirror()) if newest else ""
    directory = directory / "newest" if newest else directory
    prometheus, promtool, unpacked = _pair("prometheus", ["prometheus"], "promtool", directory, sources)
    prometheus_options: tuple[str, ...] = ()
    if unpacked:
        # Debian's build reads its web pages from disk, from the folder in an option of its own.
        prometheus_options = (
            f"--web.local-assets={unpacked}/usr/share/prometheus/web/",
            f"--web.console.templates={unpacked}/etc/prometheus/consoles",
            f"--web.console.libraries={unpacked}/etc/prometheus/console_libraries",
        )
    names = ["alertmanager", "prometheus-alertmanager"]
    alertmanager, amtool, _ = _pair("prometheus-alertmanager", names, "amtool", directory, sources)
    return Servers(prometheus, promtool, alertmanager, amtool, prometheus_options)


def package_root(package: str, directory: Path = DIRECTORY, sources: str = "") -> Path:
    """The folder with the files of `package`, its tool and its web pages; fetched if missing.

    Args:
        sources: package sources in the format of sources.list; empty: those of the system.

    Raises:
        ServersMissing: no package is available.
    """

    def choose(apt: Callable[..., str]) -> list[str]:
        depends = set(apt("apt-cache", "depends", "--recurse", "--important", package).splitlines())
        return [package, *sorted(name for name in depends if name.startswith(("libjs-", "fonts-")) or name in TOOLS)]

    root = directory / package
    if not root.exists():
        fetch_packages(root, choose, sources)
    return root


def fetch_packages(root: Path, choose: Callable[[Callable[..., str]], list[str]], sources: str = "") -> None:
    """Unpack packages into the new folder `root`. Needs no root rights, and does not change the system's package lists.

    Args:
        choose: returns the names of the packages; its argument is a function that runs an apt command and returns its
            output.
        sources: as for `package_root`.

    Raises:
        ServersMissing: a package is not available.
    """
    advice = ADVICE.format(root.name)
    missing = [command for command in ("apt-get", "apt-cache", "dpkg") if shutil.which(command) is None]
    if missing:
        raise ServersMissing(f"{root.name} is not on PATH, and this machine has no {', '.join(missing)}: {advice}")
    started = time.monotonic()
    print(f"Fetching {root.name} from the distribution's packages ...", flush=True)
    root.parent.mkdir(parents=True, exist_ok=True)
    options, complaints = _package_lists(root.parent / "apt", sources)
    # Rename into place only when complete, so that an interrupted download never looks finished.
    with tempfile.TemporaryDirectory(dir=root.parent, prefix="unfinished-") as work:
        downloads, unpacked = Path(work, "downloads"), Path(work, "unpacked")
        downloads.mkdir()

        def apt(command: str, *arguments: str) -> str:
            done = _run(command, *options, *arguments, directory=downloads)
            if done.returncode:
                reasons = "\n  ".join([*complaints, *_complaints(done)])
                raise ServersMissing(f"cannot fetch {root.name}:\n  {reasons}\nCheck the network, or {advice}")
            return done.stdout

        apt("apt-get", "download", *choose(apt))
        for archive in sorted(downloads.glob("*.deb")):
            subprocess.run(["dpkg", "-x", archive, unpacked], check=True)
        if root.name == "prometheus-alertmanager":
            _make_relocatable(unpacked)
        try:
            unpacked.rename(root)
        except OSError:
            if not root.exists():  # otherwise another process was faster
                raise
    print(f"  {root.name}: ready after {time.monotonic() - started:.0f} s", flush=True)


def _pair(package: str, names: list[str], tool: str, directory: Path, sources: str) -> tuple[Path, Path, Path | None]:
    """A server, its tool, and the folder they were unpacked into (None: both are on PATH)."""
    server_on_path = next(filter(None, map(shutil.which, names)), None)
    tool_on_path = shutil.which(tool)
    if server_on_path and tool_on_path and not sources:
        return Path(server_on_path), Path(tool_on_path), None
    root = package_root(package, directory, sources)
    server = next((path for name in names if (path := root / "usr/bin" / name).exists()), None)
    if server is None or not (root / "usr/bin" / tool).exists():
        raise ServersMissing(f"{root} lacks {' / '.join(names)} or {tool}; delete it and try again")
    return server, root / "usr/bin" / tool, root


def _make_relocatable(root: Path) -> None:
    """Make Debian's Alertmanager run from `root`.

    Debian's build reads its notification templates from a fixed folder and does not start without them.
    No option changes that folder. So replace its name in the executable by a name of the same length
    that means a file descriptor, and let a wrapper open this descriptor on the unpacked folder.
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


@functools.cache
def _package_lists(directory: Path, sources: str) -> tuple[list[str], list[str]]:
    """Fetch package lists into `directory`. Returns apt's options to use them, and apt's error messages."""
    lists, cache, file = directory / "lists", directory / "cache", directory / "sources.list"
    for folder in (lists / "partial", cache / "archives" / "partial"):
        folder.mkdir(parents=True, exist_ok=True)
    settings = [f"Dir::State::Lists={lists}", f"Dir::Cache={cache}"]
    if sources:
        file.write_text(sources)
        settings += [f"Dir::Etc::SourceList={file}", "Dir::Etc::SourceParts=/dev/null"]
    if os.geteuid() == 0:
        # apt's download user may have no access to the folder of a checkout.
        settings += ["APT::Sandbox::User=root"]
    options = [f"--option={setting}" for setting in settings]
    # Errors are not fatal here: an unreachable source may not be needed.
    return options, _complaints(_run("apt-get", *options, "update", directory=directory))


def _debian_mirror() -> str:
    command = ("apt-get", "indextargets", "--format", "$(REPO_URI)")
    known = _run(*command, directory=ROOT).stdout.split() if shutil.which("apt-get") else []
    mirror = next((address for address in known if address.rstrip("/").endswith("/debian")), None)
    if mirror is None:
        raise ServersMissing("this machine has no apt-get that knows a Debian mirror")
    return mirror


def _run(*command: str, directory: Path) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "LC_ALL": "C.UTF-8", "DEBIAN_FRONTEND": "noninteractive"}
    return subprocess.run(command, cwd=directory, env=environment, capture_output=True, text=True)


def _complaints(done: subprocess.CompletedProcess[str]) -> list[str]:
    return [line for line in done.stderr.splitlines() if line.startswith(("E:", "W:"))]


def main() -> int:
    argparse.ArgumentParser(prog="python -m stack.servers", description=__doc__).parse_args()
    try:
        servers = provide()
    except ServersMissing as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(f"  {servers.versions()}")
    for name in ("prometheus", "promtool", "alertmanager", "amtool"):
        print(f"  {name}: {getattr(servers, name)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
