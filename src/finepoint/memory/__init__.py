"""Peak memory, predicted from shapes."""
