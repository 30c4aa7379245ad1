"""Wan2.1-I2V's transformer and encoders, from which FSDiT is made (paper §2.3.1)."""
