"""LoRA tuning of MGM: `step.py` is torch only, `loop.py` runs it on Ray Train, `data.py` makes batches."""
