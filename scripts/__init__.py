"""One file per stage; `python -m scripts.X` and `python scripts/X.py` both work."""
