"""A headless Chromium: the one on PATH, else Debian's package unpacked beside the other servers, without root."""

import os
import shutil
from collections.abc import Callable
from pathlib import Path

from stack.servers import DIRECTORY, ServersMissing, fetch_packages

ChromiumMissing = ServersMissing

_PACKAGE = "chromium-headless-shell"
_ON_PATH = (_PACKAGE, "chromium", "chromium-browser", "google-chrome")
_LIBRARIES = ("lib/*-linux-gnu", "usr/lib/*-linux-gnu", "usr/lib/*-linux-gnu/pulseaudio")


def provide() -> tuple[Path, dict[str, str]]:
    """The executable, and the environment that lets it find what was unpacked with it.

    Raises:
        ChromiumMissing: there is none on PATH and none to be had from the distribution's packages.
    """
    if found := next(filter(None, map(shutil.which, _ON_PATH)), None):
        return Path(found), dict(os.environ)
    root = DIRECTORY / "chromium"
    if not root.exists():
        fetch_packages(root, _choose)
    libraries = ":".join(str(folder) for pattern in _LIBRARIES for folder in root.glob(pattern))
    environment = {**os.environ, "LD_LIBRARY_PATH": libraries}
    if not Path("/etc/fonts/fonts.conf").exists():
        environment |= {"FONTCONFIG_FILE": f"{root}/etc/fonts/fonts.conf", "XDG_DATA_HOME": f"{root}/usr/share"}
    return root / "usr/lib/chromium" / _PACKAGE, environment


def _choose(apt: Callable[..., str]) -> list[str]:
    """The package, and what it depends on where this machine lacks it."""
    plan = apt("apt-get", "install", "--simulate", "--no-install-recommends", _PACKAGE)
    return [line.split()[1] for line in plan.splitlines() if line.startswith("Inst ")]
