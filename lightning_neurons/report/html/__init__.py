"""One HTML file that shows a run: nothing to install, nothing loaded from anywhere."""
