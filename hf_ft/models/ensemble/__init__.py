"""Several classifiers as a single Transformers model."""
