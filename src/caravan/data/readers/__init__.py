"""Readers of collections, training rows and texts, a module for each family of formats."""
