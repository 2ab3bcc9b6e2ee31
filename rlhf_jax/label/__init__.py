"""Annex: a page in a browser on which people compare two answers, and what becomes of their votes.

`files` keeps pairs, votes and skips so that no kill loses or doubles one; `book` decides who sees
what next; `pairs` samples what is compared; `retrain` starts the reward stage on the votes;
`server` is the page's side of it all, and `__main__` the command.
"""
