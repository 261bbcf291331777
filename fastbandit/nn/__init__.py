"""Layers, candidate operations and networks."""
