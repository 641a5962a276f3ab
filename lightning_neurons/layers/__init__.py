"""Layers: which modules make neurons, their names, and where their neurons lie."""
