"""Features, distances and reports."""
