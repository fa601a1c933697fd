"""Checkpoints: files written atomically, hyperparameters as plain types, compatibility with networks and versions."""
