"""Crashes and damaged files at scale: `make faults`, or `python -m tests.faults`. Not part of the suite."""
