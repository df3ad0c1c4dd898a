"""Trainers that distill."""
