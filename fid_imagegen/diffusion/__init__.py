"""Diffusion and consistency mathematics on arrays and bound callables; knows no module, file or mesh."""
