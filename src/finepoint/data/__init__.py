"""Files to examples, examples to tokens, tokens to batches; data of other people by recipe."""
