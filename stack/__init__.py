"""The servers around the trainer: fetching them, running them together, receiving notifications."""
