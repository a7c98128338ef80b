"""Corruption, loss, guidance and sampling, kept apart from the network that they use."""
