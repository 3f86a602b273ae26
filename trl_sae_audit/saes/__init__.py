"""Sparse autoencoders: loading, encoding, fit, compatibility with a model, training."""
