"""Pruning: groups of coupled neurons, the choice of those to remove, and the cut that keeps training intact."""
