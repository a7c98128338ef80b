"""From a checkpoint to images: load, choose conditions, generate."""
