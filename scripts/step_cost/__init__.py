"""What a distillation step costs: the measurements behind scripts/benchmark_step.py, one file a subject."""
