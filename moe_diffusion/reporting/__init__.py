"""A run as one HTML page that people pass around: what it was, how it went, what it drew."""
