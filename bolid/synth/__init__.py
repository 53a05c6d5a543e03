"""Synthetic people: who they are (people.py) and photos of them (render.py)."""
