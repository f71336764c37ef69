"""Crashes and damaged files at scale: `make faults`, or `python -m tests.faults`. No part of the suite."""
