"""Claims put to the test: arms and seeds, a metric, a margin and a rule stated before any run."""
