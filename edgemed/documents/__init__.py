"""The documents that edgemed writes and reads back, as typed values: results, records, verdicts,
manifests, plans and the run document. This package lies below everything that produces one, and
docs/report.schema.json is generated from it.
"""
