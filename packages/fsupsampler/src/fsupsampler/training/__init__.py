"""Training of the latent upsampler (paper §2.4.1) and the refiner (paper §2.4.2)."""
