"""Pixels in and out: video and image files, and the data sets made of them."""
