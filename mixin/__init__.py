"""Alert rules, their tests, Grafana's provisioning and dashboards, as code.

`python -m mixin` writes them all. Metric names come from `exporter.metrics` and the
two thresholds of the gradient CV from `exporter.health`, so that neither can drift.
"""
