"""Teacher outputs on disk."""
