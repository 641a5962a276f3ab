"""Compensation: changes of the remaining weights that make up for removed neurons."""
