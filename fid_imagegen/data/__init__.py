"""Where records come from, and which record stands where in a run."""
