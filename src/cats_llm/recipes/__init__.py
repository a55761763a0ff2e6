"""Experiments of the paper as data: what to run, and which numbers were published. One YAML file an experiment."""
