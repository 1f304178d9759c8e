"""Configurations of other tools as options of ``mics train`` and lines of a loop of one's own."""
