"""A stage: arguments, the step, saving and resuming, validating, ranks, advice, the end."""
