"""Public weights in, shareable weights out."""
