"""The Ray Serve application: OpenAI-compatible answers of a merged MGM, in batches."""
