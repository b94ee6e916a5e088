"""The exporter process: HTTP, the status page, target files, text files and the Pushgateway. Never imports torch."""
