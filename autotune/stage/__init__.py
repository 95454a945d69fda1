"""When to search, and what to do with the answer."""
