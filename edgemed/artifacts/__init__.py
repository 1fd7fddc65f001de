"""Directories that are complete or absent: the content-addressed store, manifests, hashes, records
and lineage. Every other package writes its results through here, so that an interrupted run leaves
nothing half-made.
"""
