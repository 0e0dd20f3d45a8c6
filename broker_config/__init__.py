"""Brokers for a fleet: configuration texts, access rules, certificates, and a local broker for the demo.

Imports ``fedtide.wire`` for the topic table, and neither the coordinator nor the edge agent.
"""
