"""A model that answers: tasks, grading, kept answers, differences."""
