"""What the exporter process does: HTTP, the status page, target files, text files and the Pushgateway. Never torch."""
