"""Selection: which neurons go."""
