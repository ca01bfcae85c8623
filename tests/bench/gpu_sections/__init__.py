"""What `tests/bench/gpu.py` measures, one file a subject."""
