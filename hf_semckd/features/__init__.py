"""Features of layers: capturing them, and bringing two layers to the same positions."""
