#!/usr/bin/env bash
# tokenizers 0.23.3: a byte-level BPE that is trained from its parts drops every byte its text did not have.
#
# A byte-level tokenizer has no unknown characters: any text is bytes, and the 256 bytes are its first tokens.
# A good engineer who puts one together from its documented parts (models.BPE, pre_tokenizers.ByteLevel,
# decoders.ByteLevel, trainers.BpeTrainer) would expect `decode(encode(text)) == text`. Seen: the trainer takes
# its first tokens from the text alone, `initial_alphabet` is empty unless it is given, and BPE without an
# `unk_token` leaves out what has no token, without a word: "it cost 25 dollars" comes back as "it ost  ollars",
# since the text had no c, no d and no digit. The loss of a model on such tokens looks fine, since what is missing
# is missing on both sides. The ready-made ByteLevelBPETokenizer gives the trainer the alphabet and loses nothing.
# A vocab_size below the alphabet's is no bound, either: 257 tokens come of vocab_size=100.
#
# Exits 0 while that is so, 1 when it has changed.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet --disable-pip-version-check tokenizers==0.23.3
"$work/venv/bin/python" - <<'PYTHON'
import sys

from tokenizers import ByteLevelBPETokenizer, Tokenizer, decoders, models, pre_tokenizers, trainers

TEXT = ["a plain text of small letters"] * 10
ASKED = "it cost 25 dollars"


def from_parts(**options):
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(show_progress=False, **options)
    tokenizer.train_from_iterator(TEXT, trainer)
    return tokenizer


def back_and_forth(tokenizer):
    return tokenizer.decode(tokenizer.encode(ASKED).ids)


alphabet = pre_tokenizers.ByteLevel.alphabet()
ready_made = ByteLevelBPETokenizer()
ready_made.train_from_iterator(TEXT, vocab_size=500, show_progress=False)
seen = {
    "from its parts": back_and_forth(from_parts(vocab_size=500)),
    "with initial_alphabet": back_and_forth(from_parts(vocab_size=500, initial_alphabet=alphabet)),
    "ByteLevelBPETokenizer": back_and_forth(ready_made),
}
for name, text in seen.items():
    print(f"{name}: {text!r}")
small = from_parts(vocab_size=100, initial_alphabet=alphabet, special_tokens=["<s>"])
print("tokens of vocab_size=100:", small.get_vocab_size())
expected = ["it ost  ollars", ASKED, ASKED]
sys.exit([*seen.values()] != expected or small.get_vocab_size() != 257)
PYTHON
