"""Asks the compilers of TPUs and GPUs that are not there what a run would take."""
