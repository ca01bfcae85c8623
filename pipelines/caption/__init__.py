"""BLIP-2 captioning: `engine.py` is torch only (images in, captions out), `stage.py` runs it on Ray Data."""
