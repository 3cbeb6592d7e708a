"""Explicit image densities in torch: one paper, one file."""
