"""Recipes by name, as data."""
