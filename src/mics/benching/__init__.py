"""Measurements on the links at hand: collectives against their floor, engines side by side."""
