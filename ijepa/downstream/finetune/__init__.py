"""Fine-tuning a pretrained encoder into a classifier (paper appendices A.2 and D)."""
