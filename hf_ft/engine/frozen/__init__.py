"""What is frozen is computed once."""
