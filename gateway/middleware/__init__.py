"""Wrappers `Infer -> Infer`: one feature a file, composed in `app.py`."""
