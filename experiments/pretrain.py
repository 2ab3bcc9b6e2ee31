"""Pre-training from raw text.

    python -m rlhf_jax.main --config=experiments/pretrain.py            the embedded town
    python -m rlhf_jax.main --config=experiments/pretrain.py:fables     TinyFabulist fables
    …:shakespeare_char         nanoGPT's CPU recipe: same data, split, tokens, model, batch and steps
    …:shakespeare_char_best    the same data and split, our recipe, under a million parameters
"""
