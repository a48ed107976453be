"""Models and tokenizers: found, loaded, quantised, asked what they do with a batch."""
