"""Benchmarks: each folder prints one table and writes one JSON into results/. None of them is a test."""
