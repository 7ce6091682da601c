"""Masks: which patches of an image the context sees and the predictor predicts, packed a batch."""
