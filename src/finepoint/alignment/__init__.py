"""DPO and GRPO on chosen entries, through TRL."""
