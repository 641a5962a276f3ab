"""Running a user's code again without a trace: states, copies, and what code can reach."""
