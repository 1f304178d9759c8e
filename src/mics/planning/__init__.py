"""Which partition, does it fit, how fast, what does it cost."""
