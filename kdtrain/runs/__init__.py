"""The order of a run, from a checked config to a saved model, and its folder."""
