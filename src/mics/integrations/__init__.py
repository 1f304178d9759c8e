"""mics as a setting of other tools; each file needs its tool, and nothing of mics needs them."""
