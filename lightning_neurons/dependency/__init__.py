"""Dependencies between neurons: which can only be removed together, and where they lie in tensors."""
