"""Fine-tuning of Wan2.1 with the approximated attention in place. Empty for now."""
