"""What any training script communicates, and whether its copies of the model stay alike."""
