"""The ranks of a job: who they are, how they start, agree and speak."""
