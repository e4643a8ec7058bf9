"""Fixed networks that losses and metrics share."""
