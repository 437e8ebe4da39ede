"""Scene sources, view choice and the input pipeline: NumPy only, so workers never start JAX."""
