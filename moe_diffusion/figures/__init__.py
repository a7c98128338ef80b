"""Every picture that the library draws, from numpy arrays and plain data."""
