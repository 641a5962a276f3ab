"""The model: where its neurons are, how to watch them, how to run it without leaving a trace."""
