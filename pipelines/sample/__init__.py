"""The embedded default: the sample world (dataset, questions) and the small trained models that can read it."""
