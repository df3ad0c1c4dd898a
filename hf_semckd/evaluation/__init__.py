"""What a student is worth: quality kept, size and latency beside the teacher's, and its form for deployment (ONNX)."""
