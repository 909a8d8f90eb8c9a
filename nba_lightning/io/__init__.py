"""Strangers' files, networks and batches."""
