"""Dependencies between neurons: groups that can only be removed together, and their positions in tensors."""
