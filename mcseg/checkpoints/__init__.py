"""Checkpoints: files that a crash cannot damage, and hyperparameters as plain types."""
