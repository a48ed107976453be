"""Keep them: what a trained change is, its file, apply and revert."""
