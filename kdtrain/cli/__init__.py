"""The command `kdtrain`."""

from kdtrain.cli.app import main

__all__ = ["main"]
