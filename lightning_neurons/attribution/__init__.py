"""Attributions: what an output or a neuron rests on."""
