"""BLIP-2 captioning on Ray Data: `stage.py` walks the passes, `dataflow.py` is the one with the model."""
