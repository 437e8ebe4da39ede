"""A VQGAN that is small enough for tests."""

SMALL = dict(channels=(4, 8), blocks=1, latent_channels=3, num_codes=7, code_width=5, groups=2)
