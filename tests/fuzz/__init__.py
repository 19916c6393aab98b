"""Seeded mutations of valid model files: each must end in a working model or a typed error."""
