"""The life of callbacks that observe."""
