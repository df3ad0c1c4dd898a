"""What is shown and published of a student."""
