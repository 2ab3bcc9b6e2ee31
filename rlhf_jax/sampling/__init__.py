"""Text from a model: token samplers and an engine that decodes many completions in slots."""
