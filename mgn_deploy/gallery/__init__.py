"""A folder of images into an embedding store, and reading one."""
