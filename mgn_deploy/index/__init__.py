"""Approximate nearest neighbours for stores that outgrow exact search: by FAISS in a folder, or by Milvus."""
