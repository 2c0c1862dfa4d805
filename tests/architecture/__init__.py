"""Promises about the shape of the tree and of what is shipped."""
