"""Evaluating a model: answering, tasks, grading, kept answers, differences."""
