"""Builds the dashboards, rules and examples in ``files/`` from the catalogue of metrics.

Needed in a checkout only. What it writes is packed as ``asyncsplit/dashboards``, and
``asyncsplit dashboards export`` copies it out.
"""
