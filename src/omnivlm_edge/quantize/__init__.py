"""Smaller files of a model: recipes -> plan (a type for every tensor) -> written files."""
