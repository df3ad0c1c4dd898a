"""Trainers that distil."""
