"""The network as we call it: loading, ragged forwards."""
