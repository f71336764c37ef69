"""Searches: jobs run on top of Optuna, and candidates scored by short training runs."""
