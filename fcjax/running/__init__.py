"""A plan on arrays."""
