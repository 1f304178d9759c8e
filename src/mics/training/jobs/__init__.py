"""Job files for the schedulers of clusters: what starts ``mics train`` on many nodes."""
