"""``hf-ft demo``: strategies compared on real images."""
