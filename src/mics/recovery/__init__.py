"""Survive: the state of every rank in its node's memory, and the way back from there."""
