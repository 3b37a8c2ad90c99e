"""What this machine is, and whether what hfsft builds on works on it."""
