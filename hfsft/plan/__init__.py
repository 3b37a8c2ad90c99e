"""Memory, disk and time of a stage before it runs."""
