"""What can be trained in fewer coordinates or not at all, and when that is exact."""
