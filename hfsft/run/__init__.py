"""A run's folder on disk: room, records, checkpoints, results."""
