"""One thin entrypoint per stage: what `ray job submit` runs and what the `captune` command calls."""
