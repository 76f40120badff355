"""The steps of `seven_billion.py`, and how a process is measured from outside."""
