"""Evaluation: asking a benchmark, scoring, results on disk, tables and figures."""
