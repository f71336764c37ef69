"""Models with two paths: a classifier whose parts are computed twice, as fine-tuned and as pretrained, and gated."""
