"""Config files: one per published model, plus `digits.py`; each has `get_config(arg=None)`."""
