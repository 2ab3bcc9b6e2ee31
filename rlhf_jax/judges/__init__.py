"""Annex: AI feedback. A judge compares two answers under a principle, and we measure how well.

`constitution` reads the principles; `judge` says what a judge is, asks it in both orders, and has a
simulated one whose mistakes are chosen; `kinds` has language models, reward models and functions of
the user's as judges; `card` measures a judge against gold labels, with the rates that `rates`
corrects, and `worth` its labels against gold ones; `page` shows both. `sampled` draws answers,
`labels` has a judge label pairs of them, `revision` has a model criticise and revise them.
`ai_preference` and `ai_sft` are the stages that train on that; `__main__` is the command.
"""
