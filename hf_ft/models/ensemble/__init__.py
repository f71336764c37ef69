"""Several classifiers as one model of Transformers."""
