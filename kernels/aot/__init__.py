"""Compiling kernels for TPUs ahead of time, on a machine without one, and reading the schedule."""
