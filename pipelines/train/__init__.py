"""LoRA tuning of MGM: `step.py` is torch only, `stage.py` and `worker.py` run it on Ray Train, `data.py` batches."""
