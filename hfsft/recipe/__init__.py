"""The YAML of a run: values with file and line, every key, inheritance, overrides, checks."""
