"""Start of several ranks: their environment variables, and the store in which they meet."""
