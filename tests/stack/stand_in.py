"""A stand-in for Grafana, for code that downloads and starts it."""

from pathlib import Path

# Says that it is healthy, and what environment it was given.
EXECUTABLE = """#!/usr/bin/env python3
import http.server, json, os, sys
assert sys.argv[1:3] == ["server", "--homepath"], sys.argv
class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200 if self.path in ("/api/health", "/environment") else 404)
        self.end_headers()
        self.wfile.write(json.dumps(dict(os.environ)).encode())
address = os.environ["GF_SERVER_HTTP_ADDR"], int(os.environ["GF_SERVER_HTTP_PORT"])
http.server.HTTPServer(address, Handler).serve_forever()
"""


def stand_in_grafana(directory: Path) -> Path:
    """A new folder like that in the archive of Grafana's publisher, with an executable that only answers."""
    home = directory / "grafana-1.2.3"
    for name, text in (("bin/grafana", EXECUTABLE), ("conf/defaults.ini", "")):
        (home / name).parent.mkdir(parents=True)
        (home / name).write_text(text)
    (home / "bin/grafana").chmod(0o755)
    return home
