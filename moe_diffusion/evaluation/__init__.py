"""Judges images and routing: features, metrics, protocols, statistics."""
