"""Training sets that a model writes, and of which the filters leave what is good."""
