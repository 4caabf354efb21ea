"""Devices and processes: how parameters and batches lie on a mesh, how processes meet, agree and end together.

Imports `errors`, `untrusted` and `files` only. Nothing here knows a model, a row or the run config.
"""
