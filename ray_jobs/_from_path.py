"""Imported first by an entrypoint that was started by its path, as `ray job submit -- python ray_jobs/caption.py` does.

Python then begins its imports in this folder, where `serve.py` would hide the package `serve`; they have to begin in
the repository.
"""

import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parent.parent)
