"""Studies: sweeps that answer one question each, the arms side by side. What those that were run found is in docs/results.md."""
