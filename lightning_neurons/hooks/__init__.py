"""Watching a forward: where each neuron gets its final value, capturing and changing it."""
