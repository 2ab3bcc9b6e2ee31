"""Who the labelers of a file of votes are: how sharp, how biased, how attentive."""
