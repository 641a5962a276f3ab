"""Tables, figures, HTML pages and logger series of results. ``report/logging/tags.py`` lists every series."""
