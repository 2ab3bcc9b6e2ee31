"""Records that are left out of a training set, and why."""
