"""The tables and figures of the papers: what each is made of, and the commands that make it."""
