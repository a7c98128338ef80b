"""Pages about the library, and the program that writes the table of docs/models.md."""
