"""From a decision log to something a person can read: a page, a live page, a story in the terminal."""
