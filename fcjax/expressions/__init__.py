"""What each value is, as a sum of einsum terms over leaves."""
