"""Video files to latents and back."""
