"""mics run: an agent per node that starts ranks, sees them die or hang, and starts them again."""
