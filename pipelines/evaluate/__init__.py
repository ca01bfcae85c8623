"""One file per benchmark, the metrics they share, and the comparison of two evaluations."""
