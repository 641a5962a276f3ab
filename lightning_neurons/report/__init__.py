"""From a report to what people look at. Every series that is logged stands in ``report/logging/tags.py``."""
