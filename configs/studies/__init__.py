"""Studies: sweeps that answer one question each, the arms side by side. What they found is in docs/results.md."""
