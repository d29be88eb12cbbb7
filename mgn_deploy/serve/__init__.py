"""A bundle and a gallery as a service: requests in, embeddings and rank lists out, for many callers at once."""
