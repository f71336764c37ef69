"""Models with two paths: a classifier whose parts are computed both as fine-tuned and as pretrained, and gated."""
