"""A run's report and pictures; two runs compared."""
