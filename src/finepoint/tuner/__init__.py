"""The method: deltas beside the weights, sampled gradients, weights that follow."""
