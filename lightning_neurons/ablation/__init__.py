"""Ablation studies: the loss without neurons, measured."""
