"""Watches the metrics of PPO and names what goes wrong; it changes no weights."""
