"""Settings of every test: read by Ray and torch when they are imported, so they are made here, first."""

from __future__ import annotations

import os

# One thread a process: the processes of a small cluster share two cores.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
# Ray's workers are nice to everybody else by default and nearly stop on a busy machine.
os.environ.setdefault("RAY_worker_niceness", "0")
os.environ.setdefault("RAY_raylet_start_wait_time_s", "300")
