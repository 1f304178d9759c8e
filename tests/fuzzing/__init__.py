"""Random small models and schedules, trained by mics on four ranks and by torch in one process."""
