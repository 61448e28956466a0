"""Checking on random numbers that what a plan computes is what the network says."""
