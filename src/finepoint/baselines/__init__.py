"""What choosing entries is compared with: dense and low-rank fine-tuning through the same loop."""
