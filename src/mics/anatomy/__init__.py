"""A model seen without running it: its blocks, sizes, a trace, the memory it needs."""
