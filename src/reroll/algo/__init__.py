"""Pure functions on tensors and lists: noise, sampling, acceptance, advantages, losses."""
