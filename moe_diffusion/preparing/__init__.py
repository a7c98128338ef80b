"""Encodes the images of a data source with an autoencoder, once, into a folder of latents."""
