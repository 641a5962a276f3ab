"""Attributions: the parts of the inputs that an output or a neuron rests on."""
