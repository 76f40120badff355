"""What `switching.py` is made of: models and adapters, switches, tokens, the picture."""
