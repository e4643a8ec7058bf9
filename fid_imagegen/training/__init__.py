"""State, optimizer, checkpoints and the loop."""
