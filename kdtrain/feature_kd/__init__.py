"""Features inside both models, and their distance."""
