"""The autoencoder's own training (paper §2.2.1 to §2.2.3)."""
