"""The structure of a model for pruning: groups, costs, and the check on a copy."""
