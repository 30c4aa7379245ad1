"""How good an autoencoder is: metrics, intrinsic dimension, charts."""
