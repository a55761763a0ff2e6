"""Benchmarks: contestants take turns in one process on one machine, and the machine's own bandwidth is one of them."""
