"""What a step needs and how long it takes, worked out without a cluster."""
