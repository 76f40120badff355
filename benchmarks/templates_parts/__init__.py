"""What `templates.py` has: families, chats, and how an encoded chat is judged."""
