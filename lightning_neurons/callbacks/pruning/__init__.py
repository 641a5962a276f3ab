"""Base classes and parts of the pruning callback."""
