"""What mics doctor asks the ranks of a job, and how it reports."""
