"""Searches: jobs over Optuna, and the scoring of candidates by short trainings."""
