"""A headless Chromium: the one on PATH, else Debian's package unpacked beside the other servers, without root."""

import os
import shutil
import subprocess
import tempfile
from pathlib import Path

from stack.servers import DIRECTORY, _apt, _reasons, _update_lists

_PACKAGE = "chromium-headless-shell"
_ON_PATH = (_PACKAGE, "chromium", "chromium-browser", "google-chrome")
_LIBRARIES = ("lib/*-linux-gnu", "usr/lib/*-linux-gnu", "usr/lib/*-linux-gnu/pulseaudio")


class ChromiumMissing(RuntimeError):
    """There is none on PATH and none to be had from the distribution's packages."""


def provide() -> tuple[Path, dict[str, str]]:
    """The executable, and the environment that lets it find what was unpacked with it.

    Raises:
        ChromiumMissing: the message says what to do.
    """
    if found := next(filter(None, map(shutil.which, _ON_PATH)), None):
        return Path(found), dict(os.environ)
    root = DIRECTORY / "chromium"
    if not root.exists():
        try:
            _fetch(root)
        except (subprocess.CalledProcessError, FileNotFoundError) as error:
            reason = _reasons(error) if isinstance(error, subprocess.CalledProcessError) else error
            raise ChromiumMissing(
                f"no Chromium on PATH, nor to be had as a package: {reason}; install chromium and put it on PATH"
            ) from error
    libraries = ":".join(str(folder) for pattern in _LIBRARIES for folder in root.glob(pattern))
    environment = {**os.environ, "LD_LIBRARY_PATH": libraries}
    if not Path("/etc/fonts/fonts.conf").exists():
        environment |= {"FONTCONFIG_FILE": f"{root}/etc/fonts/fonts.conf", "XDG_DATA_HOME": f"{root}/usr/share"}
    return root / "usr/lib/chromium" / _PACKAGE, environment


def _fetch(root: Path) -> None:
    """Unpack the package into `root`, and what it depends on where this machine lacks it."""
    root.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=root.parent, prefix="unfinished-") as work:
        downloads, unpacked = Path(work, "downloads"), Path(work, "unpacked")
        downloads.mkdir()
        try:
            _download(downloads, ())
        except subprocess.CalledProcessError:
            _download(downloads, _update_lists(root.parent / "apt"))
        for archive in sorted(downloads.glob("*.deb")):
            subprocess.run(["dpkg", "-x", archive, unpacked], check=True)
        try:
            unpacked.rename(root)
        except OSError:
            if not root.exists():  # else another process was faster
                raise


def _download(downloads: Path, options: tuple[str, ...]) -> None:
    plan = _apt(["apt-get", *options, "install", "--simulate", "--no-install-recommends", _PACKAGE], downloads)
    packages = [line.split()[1] for line in plan.splitlines() if line.startswith("Inst ")]
    _apt(["apt-get", *options, "download", *packages], downloads)
