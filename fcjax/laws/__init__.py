"""Symmetries of the network, what gradient flow conserves, and what that determines."""
