"""Making a network smaller: which neurons go together, which to remove, and the cut that keeps training intact."""
