"""Layers: the module types that have neurons, their names, and the axis of their neurons."""
