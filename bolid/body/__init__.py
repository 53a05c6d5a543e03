"""The body itself: a mesh in metres (mesh.py), its measurements (measurements.py), a Gaussian over shapes (shape.py),
what a body vector says of the shape (body_vector.py), pictures of it (mannequin.py, maps.py) and files (export.py).

Axes: x to the person's left, y to the back, z up, in metres.
"""
