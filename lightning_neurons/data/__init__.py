"""Batches of any form: their samples, their targets, and the choice of a sample."""
