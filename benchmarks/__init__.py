"""Benchmarks of opd_fast against the published algorithm, both in one process."""
