"""Collage inside other people's training loops."""
