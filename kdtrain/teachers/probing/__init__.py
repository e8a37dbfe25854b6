"""The questions of `server_probe`, by what they are about."""
