"""Lightning's Trainer: steps, folders, processes, weights in use."""
