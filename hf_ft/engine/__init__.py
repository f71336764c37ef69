"""From a plan to steps: objective, parameter groups, runs."""
