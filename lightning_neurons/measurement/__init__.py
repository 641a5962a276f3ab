"""One measurement: passes over the data, their sums, and the report; no Trainer needed."""
