"""The transformer's training (paper §2.3.2)."""
