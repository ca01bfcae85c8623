"""From a trained adapter to a plain model directory: merge, and the checks that it may be trusted."""
