"""Grafana: the Python that draws the dashboards, the dashboards themselves, and provisioning to copy."""
