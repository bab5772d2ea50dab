"""Benchmarks of jaxgru and other GRU implementations; results are JSON, tables and plots."""
