"""PPO for factored discrete actions, observed by `exporter`."""
