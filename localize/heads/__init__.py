"""Local-learning rules: the interface (``base``), building blocks (``layers``), the table (``registry``)."""
