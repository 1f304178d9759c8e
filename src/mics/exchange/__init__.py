"""To and from transformers' folders: export, import, pretrained weights."""
