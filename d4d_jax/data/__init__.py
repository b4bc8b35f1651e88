"""Clips for training: rendering, procedural clips, and the grain pipeline."""
