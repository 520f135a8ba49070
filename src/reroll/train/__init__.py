"""Groups in, updated policy out."""
