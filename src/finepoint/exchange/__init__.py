"""Trade them: adapters out of checkpoints, and into and out of other people's layouts."""
