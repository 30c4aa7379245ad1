"""Weights from and to other models: DC-AE's, one decoder from another, how parts start."""
