"""What `publishing.py` tries: the cases by area, and the shop that all of them share."""
