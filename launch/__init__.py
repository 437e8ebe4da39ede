"""Command-line programs; run from the checkout, never installed."""
