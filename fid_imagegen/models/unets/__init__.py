"""Fixed-resolution generators on U-Nets: the rivals of the image functions."""
