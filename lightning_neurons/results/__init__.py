"""What a measurement found, as frozen values."""
