"""What a run shows and writes down: its log of figures, the line of progress, the summary."""
