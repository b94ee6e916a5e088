"""Integrations with other libraries' trainers. Each module imports its library; import only the one that you need."""
