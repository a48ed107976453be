"""The yardsticks: dense and low-rank fine-tuning through the same loop."""
