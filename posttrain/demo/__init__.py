"""The embedded default: a small Chinese K12 corpus of the project's own making, and a tiny base to train on it."""
