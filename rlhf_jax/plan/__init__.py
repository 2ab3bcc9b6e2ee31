"""A stage's steps compiled for chips that are not there: do they fit, and what would they cost."""
