"""A recipe for a folder of images: what they are, what this machine can do, what follows."""
