"""Experiments, each a script: `python -m experiments.NAME`."""
