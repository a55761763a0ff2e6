"""Fine-tuning: adapters trained through the thresholded activation, or on ReLUfied and dense models."""
