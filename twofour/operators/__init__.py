"""Operators of this package that are plugins like all others: see core/plugins.py."""
