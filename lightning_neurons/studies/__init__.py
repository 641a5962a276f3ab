"""Procedures on a model and data that need no Trainer."""
