"""The page of a run: what ``metrics.jsonl`` holds, drawn."""
