"""Batches of any form: their samples, their targets, a part of them."""
