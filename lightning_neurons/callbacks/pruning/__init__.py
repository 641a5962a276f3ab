"""Parts of the pruning callback."""
