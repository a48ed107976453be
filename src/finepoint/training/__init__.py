"""Move them: deltas beside the weights, sampled gradients, a training run."""
