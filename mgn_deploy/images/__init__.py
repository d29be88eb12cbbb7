"""Image files into the pixels that a network sees."""
