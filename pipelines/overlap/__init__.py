"""What training data and a benchmark have in common: a score on pictures that were trained on shows less.

`captune overlap DATASET ...` writes

    overlap.json    which rows show a benchmark's picture, and which hold its questions' words
    index.html      the pairs, side by side

and `refine.without` and `compare.overlap` read the former (`pipelines/overlapping.py`).
"""
