"""What can be asked: each task gives records, a verifier and an evaluation."""
