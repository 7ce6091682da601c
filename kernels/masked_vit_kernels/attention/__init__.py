"""Variable-length attention: the op (`varlen`), its kernels, their tiles, the CPU path."""
