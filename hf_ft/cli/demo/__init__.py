"""``hf-ft demo``: compare strategies on real images."""
