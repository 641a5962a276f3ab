"""Run a part of a recorded forward again."""
