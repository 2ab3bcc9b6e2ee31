"""Data sets as tasks: each gives records, and where it can a verifier and an evaluation."""
