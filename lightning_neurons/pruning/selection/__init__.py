"""The selection of the neurons to remove."""
