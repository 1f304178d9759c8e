"""A corpus tokenised once, by all cores of any number of nodes: what ``mics tokenize`` does."""
