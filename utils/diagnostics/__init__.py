"""Checks, memory and speed, for scripts/doctor.py and scripts/bench.py."""
