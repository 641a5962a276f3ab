"""Surgery: the cut itself, and optimizers after it."""
