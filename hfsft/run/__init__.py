"""A run's folder on disk: atomic files, disk space, records, checkpoints, results."""
