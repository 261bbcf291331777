"""Kernels that anyone can use without the search."""
