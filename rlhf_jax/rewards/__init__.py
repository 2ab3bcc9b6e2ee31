"""Rewards: scorers of (prompt, response) texts, and ensembles of reward models."""
