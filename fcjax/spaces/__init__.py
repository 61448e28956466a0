"""Hidden spaces of the parameters, and what backpropagation reaches of them."""
