"""From files to batches: records, tokenizer, chat format, packing and batches."""
