"""Which values are computed, in which order of products, by price."""
