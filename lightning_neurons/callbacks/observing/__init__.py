"""Base classes of the observing callbacks."""
