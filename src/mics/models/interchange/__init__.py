"""Models to and from transformers' folders."""
