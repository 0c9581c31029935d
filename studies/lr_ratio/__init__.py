"""The ratio of LoRA's to full fine-tuning's optimal learning rate: theories, and the claims P1 to P7 that test them."""
