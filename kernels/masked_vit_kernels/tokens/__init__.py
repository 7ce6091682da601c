"""Ops on rows of tokens: gather and scatter, patch embedding, the predictor's input, the loss."""
