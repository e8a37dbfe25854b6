"""Chat templates held against an oracle: `python -m tests.templates --table` prints templates × rows."""
