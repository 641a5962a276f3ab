"""Feature visualization: inputs that excite neurons and outputs."""
