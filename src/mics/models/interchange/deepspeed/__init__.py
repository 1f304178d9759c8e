"""Checkpoints of DeepSpeed (ZeRO-1 to ZeRO-3, MiCS) read as data: nothing in them is executed."""
