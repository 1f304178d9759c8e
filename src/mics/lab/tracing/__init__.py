"""Steps of a job recorded on every rank: one file for Perfetto, and what it says in words."""
