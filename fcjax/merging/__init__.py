"""A trained network for inference, every linear segment one operator."""
