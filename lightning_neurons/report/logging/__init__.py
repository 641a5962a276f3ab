"""Series, text and images in the Trainer's loggers."""
