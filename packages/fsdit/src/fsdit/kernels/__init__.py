"""Triton kernels; the plain forms they must equal are in `fsdit.layers`."""
