"""Who runs the parts, when, and where."""
