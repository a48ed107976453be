"""Tell the truth about them: scores, metrics, the demo."""
