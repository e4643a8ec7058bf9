"""Networks: Linen modules whose constructor arguments are plain values."""
