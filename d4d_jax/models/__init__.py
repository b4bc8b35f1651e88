"""Networks and latent codecs (Flax Linen); nothing is imported here."""
