"""What a pretrained encoder is used for: embedding folders, evaluation, fine-tuning."""
