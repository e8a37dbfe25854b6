"""The questions of `probe.py`, by what they are about."""
