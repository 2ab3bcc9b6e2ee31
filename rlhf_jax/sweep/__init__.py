"""Sweeps: many runs of one config that differ in some fields and in their seed, as one finding."""
