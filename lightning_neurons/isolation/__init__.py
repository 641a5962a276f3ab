"""Run a user's code again without changing anything: states, copies, and all that the code can reach."""
