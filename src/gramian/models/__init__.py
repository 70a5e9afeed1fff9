"""Whole networks: walking them, swapping layers, saving, loading, and the calls that compress one."""
