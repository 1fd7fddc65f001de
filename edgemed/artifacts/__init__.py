"""Directories that are whole or absent: the content-addressed store, hashes, records and lineage.
Every other package writes its results through here, so that an interrupted run leaves nothing
half-made.
"""
