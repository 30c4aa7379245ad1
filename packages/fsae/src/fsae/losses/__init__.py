"""The autoencoder's losses (paper §2.2.1 and §2.2.2): reconstruction, perceptual, adversarial and alignment."""
