"""The life of a callback that cuts."""
