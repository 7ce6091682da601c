"""AdamW with the moving average of a target network in one pass, and the average alone."""
