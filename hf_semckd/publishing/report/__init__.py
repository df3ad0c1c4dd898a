"""The report of a distillation: one HTML page, and its data as JSON."""
