"""From a function to equations: what the network is."""
