"""The autoencoder's losses (paper §2.2.2): reconstruction and perceptual."""
