"""Checks, memory and speed: what scripts/doctor.py and scripts/bench.py report."""
