"""Loading, wrapping and inspecting models."""
