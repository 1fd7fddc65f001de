"""The report: what may be shown, which charts, and how runs are compared. A report is a pure
function of manifests and records.
"""
