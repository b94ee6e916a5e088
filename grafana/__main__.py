"""`python -m grafana`: writes grafana/dashboards/*.json. To use the dashboards you need only these files."""

import argparse
import json
import sys
from pathlib import Path

from grafana.fleet import fleet_dashboard
from grafana.run import run_dashboard

DASHBOARDS = Path(__file__).resolve().parent / "dashboards"


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m grafana", description=__doc__)
    parser.add_argument("--check", action="store_true", help="write nothing; list files that differ and exit with 1")
    check = parser.parse_args(arguments).check
    status = 0
    for dashboard in (run_dashboard(), fleet_dashboard()):
        path, text = DASHBOARDS / f"{dashboard['uid']}.json", json.dumps(dashboard, indent=2) + "\n"
        if path.is_file() and path.read_text(encoding="utf-8") == text:
            continue
        if check:
            status = 1
        else:
            path.write_text(text, encoding="utf-8")
        print(f"{path}: {'differs' if check else 'written'}")
    return status


if __name__ == "__main__":
    sys.exit(main())
