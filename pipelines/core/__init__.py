"""Base of all stages: storage, errors, signals, the Ray session and JSON Lines."""
