"""`make grafana` from a server of our own, with an archive that stands in for Grafana's."""

import functools
import hashlib
import http.server
import platform
import shutil
import threading
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from unittest.mock import Mock

import pytest
from stand_in import stand_in_grafana

from stack import grafana


@pytest.fixture
def publisher(tmp_path: Path) -> Iterator[tuple[str, Path]]:
    """The address of a web server, and the folder that it serves."""
    folder = tmp_path / "published"
    folder.mkdir()
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=folder)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever).start()
        yield f"http://127.0.0.1:{server.server_port}", folder
        server.shutdown()


def publish(home: Path, folder: Path) -> tuple[str, str]:
    """Name and checksum of an archive of `home`."""
    archive = Path(shutil.make_archive(str(folder / "grafana"), "gztar", home.parent, home.name))
    return archive.name, hashlib.sha256(archive.read_bytes()).hexdigest()


def test_an_archive_is_checked_and_unpacked_and_replaced(publisher, tmp_path, monkeypatch, capsys):
    url, folder = publisher
    home, target = stand_in_grafana(tmp_path), tmp_path / "servers/grafana"
    monkeypatch.setattr(grafana, "DIRECTORY", target)
    useless = tmp_path / "elsewhere/bin/grafana"  # one on PATH whose files cannot be found
    useless.parent.mkdir(parents=True)
    shutil.copy(home / "bin/grafana", useless)
    monkeypatch.setenv("PATH", str(useless.parent), prepend=":")
    assert grafana.find() is None
    for version in (b"1", b"2"):
        (home / "VERSION").write_bytes(version)
        name, sha256 = publish(home, folder)
        assert grafana.main(["--url", f"{url}/{name}", "--sha256", sha256]) == 0
        assert (target / "VERSION").read_bytes() == version
        assert grafana.find() == ([str(target / "bin/grafana"), "server"], target)

    (folder / name).write_bytes((folder / name).read_bytes() + b"changed")
    capsys.readouterr()
    for words in (["--sha256", sha256], []):  # nothing to do; another checksum than the publisher's
        assert grafana.main(["--url", f"{url}/{name}", *words]) == (0 if words else 1)
    assert "has the SHA-256" in capsys.readouterr().err
    assert grafana.main(["--url", f"{url}/none.tar.gz", "--sha256", "0"]) == 1
    assert f"cannot fetch {url}/none.tar.gz: HTTP Error 404" in capsys.readouterr().err
    assert grafana.main(["--url", "http://127.0.0.1:x/", "--sha256", "0"]) == 1
    assert "cannot fetch http://127.0.0.1:x/: nonnumeric port" in capsys.readouterr().err
    monkeypatch.setattr(urllib.request, "urlopen", Mock(side_effect=KeyboardInterrupt))
    assert grafana.main(["--url", f"{url}/{name}", "--sha256", "0"]) == 130
    assert (target / "VERSION").read_bytes() == b"2", "what was there must stay"
    assert [path.name for path in target.parent.iterdir()] == ["grafana"], "something is left over"


def test_without_network_or_an_archive_for_the_machine_the_way_out_is_told(tmp_path, monkeypatch):
    with pytest.raises(grafana.GrafanaError, match="refused.*\nCheck the network"):
        monkeypatch.setattr(grafana, "URL", "http://127.0.0.1:9/{0}-{1}.tar.gz")
        grafana.fetch(tmp_path / "grafana")
    monkeypatch.setattr(platform, "machine", lambda: "riscv64")
    with pytest.raises(grafana.GrafanaError, match="no archive .* for Linux riscv64; name one with --url"):
        grafana.fetch(tmp_path / "grafana")
