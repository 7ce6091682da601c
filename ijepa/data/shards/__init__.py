"""Images in tar files of the WebDataset layout, read by random access."""
