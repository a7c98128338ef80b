"""Tells whether a run fits on accelerators and what it costs there, without having them."""
