"""Clips made ready for training once: captions, prompts, latents in shards."""
