"""Making up for what a cut takes away: what the remaining weights are given before it is made."""
